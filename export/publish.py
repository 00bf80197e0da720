"""A folder of graphs that is either the old export or the new one: staged, compared, then moved in and made known.

Weights go first, graphs second, the manifest last; what only the old manifest names is removed after that.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchrank.atomic import sha256_of, write_json

SCHEMA = 1


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A temporary folder inside `out`, on the same file system; removed whatever happens.

    A folder that was made for this only is removed too, if nothing was published.
    """
    existed = out.is_dir()
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out, prefix=".staging-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed and not any(out.iterdir()):
            out.rmdir()


def files_of(manifest: dict[str, Any]) -> set[str]:
    """Names of the files that a manifest answers for."""
    return {name for model in manifest.get("models", []) for name in model.get("files", {})}


def publish(staged: Path, out: Path, manifest: dict[str, Any], name: str) -> Path:
    """Move staged files into `out`, write the manifest `name`, remove what the old one named alone.

    Args: manifest, JSON values; `models[].files` lists file names, weights before graphs, and gets their checksums.
    """
    path = out / name
    old = files_of(read_manifest(path)) if path.is_file() else set()
    order = list(dict.fromkeys(file for model in manifest["models"] for file in model["files"]))
    order.sort(key=lambda file: not file.endswith(".bin"))
    sums = {file: sha256_of(staged / file) for file in order}
    for model in manifest["models"]:
        model["files"] = {file: sums[file] for file in model["files"]}
    for file in order:
        (staged / file).chmod(0o644)
        (staged / file).replace(out / file)
    write_json(path, manifest | {"schema": SCHEMA})
    for file in old - set(order):
        (out / file).unlink(missing_ok=True)
    return path


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest's content; empty if it cannot be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
