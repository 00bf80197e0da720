"""Read-only access to the files of one data set, in a folder or straight from an uncompressed tar.

Names are always relative to the data set's own root, with forward slashes: they are the image ids of every store.
Nothing here writes, and nothing is extracted.
"""

import os
import posixpath
import tarfile
from pathlib import Path
from typing import Protocol

from patchrank.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff")


class Files(Protocol):
    """What a reader may ask of a data set's files."""

    root: Path

    def has(self, name: str) -> bool:
        """Whether a regular file of that name is there."""

    def walk(self, folder: str = "") -> list[str]:
        """All files below `folder`, sorted; hidden ones are left out."""

    def read(self, name: str) -> bytes:
        """Bytes of one file. Raises: OSError."""


def is_image(name: str) -> bool:
    """Whether the name ends like a picture."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


class FolderFiles:
    """Files below one folder; symbolic links are followed, each folder once."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._entries: dict[str, frozenset[str]] = {}

    def has(self, name: str) -> bool:
        folder, _, file = name.rpartition("/")
        if folder not in self._entries:
            path = self.root / folder
            names = [entry.name for entry in os.scandir(path) if entry.is_file()] if path.is_dir() else []
            self._entries[folder] = frozenset(names)
        return file in self._entries[folder]

    def walk(self, folder: str = "") -> list[str]:
        seen, names = set(), []
        for current, folders, files in os.walk(self.root / folder, followlinks=True):
            real = os.path.realpath(current)
            folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
            if real not in seen:
                below = Path(current).relative_to(self.root)
                names += [(below / name).as_posix() for name in files if not name.startswith(".")]
            seen.add(real)
        return sorted(names)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


class TarFiles:
    """Files of an uncompressed tar, indexed once and read by offset; each read opens the tar, so threads and forks do.

    A single top folder is the data set's root. Members that are no regular files, or that point outside, are not seen.

    Raises: UserError where the file is not an uncompressed tar, or ends early.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        members = _index(self.root)
        tops = {name.split("/")[0] if "/" in name else "" for name in members}
        top = tops.pop() + "/" if len(tops) == 1 and "" not in tops else ""
        self._members = {name.removeprefix(top): place for name, place in members.items()}

    def has(self, name: str) -> bool:
        return name in self._members

    def walk(self, folder: str = "") -> list[str]:
        prefix = folder.rstrip("/") + "/" if folder else ""
        return sorted(name for name in self._members if name.startswith(prefix) and not _hidden(name))

    def read(self, name: str) -> bytes:
        if name not in self._members:
            raise FileNotFoundError(f"{name} in {self.root}")
        offset, size = self._members[name]
        with open(self.root, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise OSError(f"{name} in {self.root}: the archive ends early")
        return data


def _index(path: Path) -> dict[str, tuple[int, int]]:
    """Member name -> (offset, size) of every regular member; a later member of the same name replaces an earlier."""
    members = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                if member.isreg() and member.sparse is None and not name.startswith(("/", "..")):
                    members[name] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a complete, uncompressed tar ({error}); fetch or unpack it again") from None
    return members


class FilesWithSplits:
    """Files of a data set, and beside them split files from one shared folder; the data set's own come first."""

    def __init__(self, files: Files, splits: Path) -> None:
        self.root = files.root
        self.walk = files.walk
        self._files = files
        self._splits = FolderFiles(splits)

    def has(self, name: str) -> bool:
        return self._files.has(name) or self._splits.has(name)

    def read(self, name: str) -> bytes:
        return (self._files if self._files.has(name) else self._splits).read(name)


def open_files(path: str | Path) -> Files:
    """`TarFiles` for a file, `FolderFiles` for a folder."""
    return TarFiles(path) if Path(path).is_file() else FolderFiles(path)
