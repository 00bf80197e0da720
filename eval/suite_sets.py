"""The data sets of a suite: which are measured and how, which lack their images, and what was verified of those."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.report_data import MEASURED, SEVEN, title_of
from patchrank.data import Dataset, Item, load_dataset
from patchrank.data.catalog import CATALOG
from patchrank.data.files import FilesWithSplits, FolderFiles
from patchrank.data.load import default_root
from patchrank.errors import UserError
from patchrank.loading import LoadedClip
from patchrank.search.runner import spread

PUBLISHED = {
    "caltech101": 2465,
    "pets": 3669,
    "flowers102": 2463,
    "food101": 30300,
    "aircraft": 3333,
    "dtd": 1692,
    "ucf101": 3783,
}
"""Test images of the published splits (CoOp's; the official one of FGVCAircraft)."""
ABSENT = "loader verified, images not present"
UNVERIFIED = "images not present"
_HOME = {200: "tiny-imagenet", 1000: "imagenet"}
"""Number of classes of a classifier's head -> the data set that it most likely answers."""


@dataclass(frozen=True)
class Absent:
    """A data set that cannot be measured here, and why."""

    name: str
    state: str
    text: str
    num_listed: int | None = None
    """Test images that its split file lists."""
    hint: str = ""
    """Where the files would have to be."""


@dataclass(frozen=True)
class Present:
    """A data set whose images are there, its items in the order of measurement."""

    dataset: Dataset
    items: list[Item]

    @property
    def text(self) -> str:
        """How much of the published test split is here and measured."""
        published, there = PUBLISHED.get(self.dataset.name), len(self.dataset.images)
        of = f" of {there:,}" if len(self.items) < there else ""
        rest = f"; the published split has {published:,}" if published and published != there else ""
        return f"{len(self.items):,}{of} test images{rest}"


def default_sets(clip: LoadedClip) -> tuple[str, ...]:
    """The data set that a model is at home on, then the seven; the embedded model knows nothing but digits."""
    if clip.model_name == "embedded":
        return ("digits",)
    home = None if clip.class_head is None else _HOME.get(len(clip.class_head[0]))
    return ((home,) if home else ()) + SEVEN


def find_sets(names: Sequence[str], root: Path | None, limit: int | None) -> tuple[list[Present], list[Absent]]:
    """What of `names` can be measured: the test split, `limit` images spread over the classes (None: all).

    Args: names, rows of the catalog or halves of their classes (`caltech101/odd`).
    Raises: UserError for a root that is not there, an unknown name, or a set whose files are there and wrong.
    """
    if root is not None and not root.is_dir():
        raise UserError(f"--data-root {root} is not a folder; give an existing one")
    present, absent = [], []
    for name in dict.fromkeys(names):
        row = name.partition("/")[0]
        if row not in CATALOG:
            raise UserError(f"--datasets {name}: unknown; choose from {', '.join(CATALOG)}")
        if not has_files(row, root):
            absent.append(without_images(row, root))
            continue
        dataset = load_dataset(name, root=root, split="test")
        present.append(Present(dataset, spread(dataset.images, limit)))
    return present, absent


def has_files(name: str, root: Path | None) -> bool:
    """Whether a data set's folder or tar is under the data root."""
    row, root = CATALOG[name], default_root() if root is None else root
    if row.draw is not None:
        return True
    return root is not None and any((root / (folder + end)).exists() for folder in row.folders for end in ("", ".tar"))


def without_images(name: str, root: Path | None) -> Absent:
    """What can be said of a data set without its images: the real reader on the real split file, where that is here."""
    root = default_root() if root is None else root
    row, published = CATALOG[name], PUBLISHED.get(name)
    known = f"{published:,} published test images; " if published else ""
    splits = None if root is None else root / "splits"
    if splits is not None and splits.is_dir():
        with tempfile.TemporaryDirectory() as nothing:
            try:
                listing = row.read(FilesWithSplits(FolderFiles(nothing), splits), row.splits["test"])
            except (UserError, LookupError, TypeError, AttributeError, ValueError, OSError):
                listing = None
        if listing is not None:
            count = len(listing.items)
            agrees = "as published" if count == published else f"not the {published:,} published"
            text = f"official split file read: {count:,} test images, {agrees}" if published else f"{count:,} listed"
            return Absent(name, ABSENT, text, count)
    hint = f"put the files under --data-root: {row.layout}"
    return Absent(
        name, ABSENT if name in SEVEN else UNVERIFIED, f"{known}reader tested on the official layout", hint=hint
    )


def describe(present: Sequence[Present], absent: Sequence[Absent], root: Path | None) -> list[dict]:
    """One entry per data set for the suite's JSON; the seven are always there."""
    named = {one.dataset.name for one in present} | {one.name for one in absent}
    other = [name for name in SEVEN if name not in named]
    absent = [*absent, *(without_images(name, root) for name in other if not has_files(name, root))]
    found = [
        {
            "name": one.dataset.name,
            "title": title_of(one.dataset.name),
            "state": MEASURED,
            "text": one.text,
            "num_images": len(one.items),
            "source": one.dataset.split_source,
        }
        for one in present
    ]
    found += [
        {
            "name": one.name,
            "title": title_of(one.name),
            "state": one.state,
            "text": one.text,
            "num_listed": one.num_listed,
            "hint": one.hint,
        }
        for one in absent
    ]
    found += [
        {
            "name": name,
            "title": title_of(name),
            "state": "not asked for",
            "text": "images present; name it in --datasets",
        }
        for name in other
        if has_files(name, root)
    ]
    order = {name: place for place, name in enumerate(SEVEN)}
    return sorted(found, key=lambda one: order.get(one["name"], -1))
