"""The log of a run: one JSON object a line in `log.jsonl`, and TensorBoard's event files where they are asked for."""

import json
import os
from pathlib import Path
from typing import Any

from patchrank.errors import UserError


class RunLog:
    """Rows by step; rows after the step that a run goes on from are cut away, as it will write them again.

    Raises: UserError if TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False) -> None:
        self.path = folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = _writer(folder, step) if tensorboard else None
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if (row := _row(line)) is not None and row["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, self.path)

    def add(self, step: int, values: dict[str, Any]) -> None:
        """One row; numbers go to TensorBoard as well."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what TensorBoard holds back."""
        if self._writer is not None:
            self._writer.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All whole rows of a run's log."""
    path = folder / "log.jsonl"
    rows = map(_row, path.read_text().splitlines()) if path.exists() else ()
    return [row for row in rows if row is not None]


def _row(line: str) -> dict[str, Any] | None:
    """A row; None for a line that a kill tore off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def _writer(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard: is not installed; pip install 'patchrank[pretrain]'") from error
    return SummaryWriter(str(folder), purge_step=step + 1)
