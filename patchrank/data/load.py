"""From a name to a data set: look the row up, find its files, read one split, say what is missing."""

import logging
import os
from pathlib import Path

from patchrank.data.catalog import CATALOG, DatasetRow
from patchrank.data.dataset import Dataset, Item
from patchrank.data.files import Files, FilesWithSplits, open_files
from patchrank.data.halves import half_of
from patchrank.errors import UserError

logger = logging.getLogger(__name__)

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".zip")


def default_root() -> Path | None:
    """`$PATCHRANK_ASSETS/data` where that variable is set."""
    assets = os.environ.get("PATCHRANK_ASSETS")
    return Path(assets) / "data" if assets else None


def find_files(name: str, row: DatasetRow, root: str | Path | None = None) -> Files:
    """The data set's folder or tar under `root` (or `root` itself), with split files of `root`/splits beside them.

    Raises: UserError naming the folder, the expected layout and where the official files come from.
    """
    if root is None:
        root = default_root() if row.folders else None
    where = f"{row.folders[0]}/ holding " if row.folders else ""
    remedy = f"expected {where}{row.layout}; official files: {row.source}"
    if root is None:
        raise UserError(f"{name}: no data root given; set --data-root; {remedy}")
    root = Path(root)
    if not root.exists():
        raise UserError(f"{name}: {root} does not exist; give --data-root an existing folder; {remedy}")
    paths = [root / (folder + suffix) for folder in row.folders for suffix in ("", ".tar")]
    own = [root] if not row.folders or root.name.removesuffix(".tar") in row.folders else []
    for path in own + paths:
        if path.exists():
            files, splits = open_files(path), root / "splits"
            return FilesWithSplits(files, splits) if row.folders and splits.is_dir() else files
    packed = [path for folder in row.folders for suffix in _PACKED if (path := root / (folder + suffix)).exists()]
    hint = f"{packed[0]} is compressed: unpack it first; " if packed else ""
    raise UserError(f"{name}: {root / row.folders[0]} not found; {hint}{remedy}")


def load_dataset(name: str, root: str | Path | None = None, split: str = "test", *, official: bool = False) -> Dataset:
    """One split of one data set of the catalog, in the order of its split file.

    Args: name, a row of the catalog, or half of its classes as `<row>/even` or `<row>/odd`. root, the folder that holds
    the official data sets' folders or their uncompressed tars; for "folder", the picture folder itself; default
    `$PATCHRANK_ASSETS/data`. official, read the official splits even where CoOp's split file is there (protocols differ
    in this).
    Pictures that the split lists and the disk lacks are left out, logged and listed in `missing`.

    Raises: UserError for an unknown name or split, a given root that is not there (also where nothing is read from it),
    absent or malformed files, or a split without any picture.
    """
    name, slash, half = name.partition("/")
    if name not in CATALOG:
        raise UserError(f"data set {name!r}: unknown; choose one of {', '.join(CATALOG)}")
    row = CATALOG[name]
    if split not in row.splits:
        raise UserError(f"split {split!r} of {name}: unknown; choose one of {', '.join(row.splits)}")
    if row.draw and root is not None and not Path(root).is_dir():
        raise UserError(f"{name}: --data-root {root} is not a folder; give an existing one, or none: {name} has none")
    files = None if row.draw else find_files(name, row, root)
    try:
        read = row.official if official and row.official else row.read
        listing = read(files, row.splits[split])
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        found = f"its files do not read as they should ({type(error).__name__}: {error})"
        raise UserError(f"{files.root}: {found}; expected {row.layout}; fetch them again: {row.source}") from error
    images, missing = _present(files, listing.items)
    if not images:
        raise UserError(
            f"{files.root}: no picture of split {split!r} ({len(missing)} listed by {listing.source}); "
            f"expected {row.layout}; official files: {row.source}"
        )
    if missing:
        num_listed = len(listing.items)
        logger.warning("%s: %d of %d pictures in %s are missing", name, len(missing), num_listed, listing.source)
    dataset = Dataset(
        name=name,
        split=row.splits[split],
        images=images,
        class_names=listing.class_names,
        templates=(row.template,),
        ensemble=row.ensemble,
        root=files.root if files else None,
        split_source=listing.source,
        missing=missing,
        read=row.draw or files.read,
    )
    return half_of(dataset, half) if slash else dataset


def _present(files: Files | None, items: list[Item]) -> tuple[list[Item], list[str]]:
    """Items that are there, and the ids of the others."""
    if files is None:
        return items, []
    images, missing = [], []
    for item in items:
        if files.has(item.id):
            images.append(item)
        else:
            missing.append(item.id)
    return images, missing
