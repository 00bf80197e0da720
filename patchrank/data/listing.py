"""What every reader returns, and the few steps that several readers share."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from patchrank.data.dataset import Item
from patchrank.data.files import Files, is_image
from patchrank.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Listing:
    """One split as its files say it, before anybody looked whether the pictures are there."""

    items: list[Item]
    class_names: list[str] = field(default_factory=list)
    source: str
    """The file or folder that defines the split."""


Reader = Callable[[Files, str], Listing]


def readable(name: str) -> str:
    """Class name for a prompt: underscores become spaces (as CoOp does)."""
    return name.replace("_", " ").strip()


def read_json(files: Files, name: str) -> Any:
    """Content of a JSON file. Raises: UserError where it is not JSON."""
    try:
        return json.loads(files.read(name))
    except ValueError as error:
        raise UserError(f"{files.root}/{name}: not valid JSON ({error}); fetch the official file again") from None


def read_lines(files: Files, name: str) -> list[str]:
    """Lines of a text file without blank ones."""
    return [line.strip() for line in files.read(name).decode("utf-8", "replace").splitlines() if line.strip()]


def first_present(files: Files, names: Iterable[str]) -> str | None:
    """The first of several file names that is there."""
    return next((name for name in names if files.has(name)), None)


def no_split(files: Files, split: str, known: Iterable[str], remedy: str) -> UserError:
    """The error for a split that the files at hand do not define."""
    return UserError(f"split {split!r}: {files.root} defines {', '.join(known) or 'none'}; {remedy}")


def class_folder_items(files: Files, folder: str, label_of: dict[str, int]) -> list[Item]:
    """Pictures below `folder`/<class>/, sorted by name; classes that `label_of` lacks are left out."""
    prefix = folder + "/" if folder else ""
    items = []
    for name in filter(is_image, files.walk(folder)):
        label = label_of.get(name.removeprefix(prefix).split("/")[0])
        if label is not None:
            items.append(Item(name, label))
    return items
