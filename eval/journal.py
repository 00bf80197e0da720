"""An append-only file of results, one JSON object a line: what a kill leaves is read back, the rest computed again."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from patchrank.errors import UserError


class Journal:
    """Records by key, in memory and on disk.

    A line that a kill tore off is cut away when the file is opened; whole lines are never rewritten.

    Args: path, made when the first record comes; key, the fields that tell records apart.
    Raises: UserError for a whole line that is no record.
    """

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self.path = path
        self.key = key
        self._records: dict[tuple, dict] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._keep(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: line {number} is damaged; delete it and run the same command again") from None

    def _keep(self, record: dict) -> None:
        self._records[tuple(record[name] for name in self.key)] = record

    def add(self, *records: dict) -> None:
        """Append records; on return they are on disk."""
        for record in records:
            self._keep(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())

    def get(self, *key) -> dict | None:
        """The record of this key, or None."""
        return self._records.get(key)

    def __contains__(self, key: tuple) -> bool:
        return key in self._records

    def __iter__(self) -> Iterator[dict]:
        return iter(list(self._records.values()))

    def __len__(self) -> int:
        return len(self._records)
