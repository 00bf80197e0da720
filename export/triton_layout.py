"""A Triton model repository on disk: a folder per model, a numbered folder per version, always whole.

A version is staged outside the repository and renamed into it; `config.pbtxt` is replaced in one step after that. So a
server that polls, or is told to load at any moment, meets the old version or the new one.
"""

import os
import re
import shutil
from pathlib import Path

from export.publish import staging
from patchrank.atomic import sha256_of, write_text

KEPT_VERSIONS = 2
"""The version that serves and the one before it, to go back to."""


def versions_of(folder: Path) -> list[int]:
    """Numbers of a model's versions, oldest first."""
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"[1-9]\d*", name))


def same_files(folder: Path, files: dict[str, Path]) -> bool:
    """Whether `folder` holds exactly these contents under these names."""
    if {path.name for path in folder.iterdir()} != set(files):
        return False
    return all(sha256_of(folder / name) == sha256_of(source) for name, source in files.items())


Placed = dict[Path, Path]
"""Source -> its copy in the repository, of what one run has placed so far."""


def link_or_copy(source: Path, target: Path, placed: Placed) -> None:
    """Copy a file, or give the repository's copy of it a second name: weights of variants lie there once.

    Never a link to the source itself: whoever writes into that would change what a server has mapped.
    """
    try:
        os.link(placed[source], target)
    except (KeyError, OSError):  # the first of its kind, or a file system without hard links
        shutil.copyfile(source, target)


def place_version(repository: Path, name: str, files: dict[str, Path], placed: Placed) -> int:
    """Make `files` (name in the version -> source) the newest version of a model; returns its number.

    If the newest version has these contents already, nothing is written. Changes `placed`.
    """
    folder = repository / name
    numbers = versions_of(folder)
    number = numbers[-1] if numbers else 0
    if not numbers or not same_files(folder / str(number), files):
        number += 1
        folder.mkdir(parents=True, exist_ok=True)
        with staging(repository.parent) as staged:
            version = staged / str(number)
            version.mkdir()
            for target, source in files.items():
                link_or_copy(source, version / target, placed)
            version.rename(folder / str(number))
    placed |= {source: folder / str(number) / target for target, source in files.items()}
    return number


def write_model(
    repository: Path, name: str, files: dict[str, Path], config: str, texts: dict[str, str], placed: Placed
) -> int:
    """A version, the texts beside it (labels), then the configuration; older versions than KEPT_VERSIONS are removed.

    Returns: the number of the version that serves.
    """
    number = place_version(repository, name, files, placed)
    for text_name, text in (texts | {"config.pbtxt": config}).items():
        path = repository / name / text_name
        if not path.is_file() or path.read_text() != text:
            write_text(path, text)
    for old in versions_of(repository / name)[:-KEPT_VERSIONS]:
        shutil.rmtree(repository / name / str(old))
    return number


def remove_others(repository: Path, prefix: str, names: set[str]) -> list[str]:
    """Remove models of an earlier run (named `prefix` or `prefix-...`) that are not in `names`; returns their names."""
    found = [path.name for path in repository.iterdir() if path.name == prefix or path.name.startswith(f"{prefix}-")]
    gone = sorted(set(found) - names)
    for name in gone:
        shutil.rmtree(repository / name)
    return gone
