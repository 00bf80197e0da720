"""Pictures with captions, whatever they come from: `load_pairs` reads one data set or a mixture of several.

    flickr8k                        the catalog's captions
    caltech101, food101, folder     class folders: every class name in a few templates
    captions                        your own folder: captions.json, captions.csv, or a .txt beside every picture
    flickr8k+caltech101+food101     a mixture: all pictures of its parts, each as often as it is there

WebDataset shards are a stream and live in `patchrank.pretrain.shards`.
"""

import csv
import io
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from patchrank.data import CATALOG, Dataset, Item, load_dataset
from patchrank.data.files import Files, is_image, open_files
from patchrank.data.listing import read_json
from patchrank.errors import UserError

logger = logging.getLogger(__name__)

SHARDS = "shards"
"""Name of a data set that is a stream of tar files."""
CAPTION_FOLDER = "captions"
TEMPLATES = ("{}", "a photo of a {}.", "a picture of a {}.", "this is a {}.")
"""What is said about a class, beside the data set's own template."""
UNSAID = "a photo"
"""Caption of a picture whose captions are all blank."""
_SPLITS = ("train", "val", "test")
_LAYOUT = (
    "captions.json {name: {split, captions}}, captions.csv (filename, caption, split; a row a caption), "
    "or a .txt with a caption a line beside every picture, optionally inside train/, val/, test/"
)


def parts_of(name: str) -> list[str]:
    """Names of a mixture: "a+b" -> ["a", "b"]. Raises: UserError for a name that nobody knows."""
    parts = name.split("+")
    known = [*CATALOG, CAPTION_FOLDER, SHARDS]
    for part in parts:
        if part not in known:
            raise UserError(f"--data {part}: unknown; choose one of {', '.join(known)}, or several joined by +")
    if SHARDS in parts and len(parts) > 1:
        raise UserError(f"--data {name}: shards do not mix with others; write the others into shards")
    return parts


def load_pairs(name: str, root: str | Path | None = None, split: str = "train") -> Dataset:
    """One split in which every picture has at least one caption; of a mixture, the parts in their order.

    Blank captions are left out; a picture without any other says UNSAID, counted in the log.
    Raises: UserError for unknown names, absent files, or pictures with neither captions nor classes.
    """
    parts = [with_captions(load_part(part, root, split)) for part in parts_of(name)]
    return parts[0] if len(parts) == 1 else mixture(name, parts)


def load_part(name: str, root: str | Path | None, split: str) -> Dataset:
    """One data set of the catalog, or a folder with captions, as its files say it."""
    if name == CAPTION_FOLDER:
        return read_caption_folder(root, split)
    return load_dataset(name, root=root, split=split)


def with_captions(dataset: Dataset) -> Dataset:
    """The data set with a caption for every picture: its own, or its class in `TEMPLATES`."""
    names, templates = dataset.class_names, tuple(dict.fromkeys((*dataset.templates, *TEMPLATES)))
    of_class = [tuple(template.format(name) for template in templates) for name in names]
    images, num_unsaid = [], 0
    for item in dataset.images:
        captions = tuple(text.strip() for text in item.captions if text.strip())
        if not item.captions:
            if item.label is None:
                raise UserError(
                    f"--data {dataset.name}: {item.id} has neither captions nor a class; add captions, or leave it out"
                )
            captions = of_class[item.label]
        elif not captions:
            captions, num_unsaid = (UNSAID,), num_unsaid + 1
        images.append(item if captions == item.captions else replace(item, captions=captions))
    if num_unsaid:
        logger.warning("%s: %d pictures have blank captions only; they say %r", dataset.name, num_unsaid, UNSAID)
    return replace(dataset, images=images)


def mixture(name: str, parts: list[Dataset]) -> Dataset:
    """Several data sets as one without classes; ids begin with the part's name."""
    by_name = {part.name: part for part in parts}
    if len(by_name) < len(parts):
        raise UserError(f"--data {name}: names a data set twice; name each once")
    images = [Item(f"{part.name}:{item.id}", None, item.captions) for part in parts for item in part.images]

    def read(id: str) -> object:
        part, _, own = id.partition(":")
        return by_name[part].read(own)

    sources = ", ".join(part.split_source for part in parts)
    return Dataset(name=name, split=parts[0].split, images=images, split_source=sources, read=read)


def read_caption_folder(root: str | Path | None, split: str) -> Dataset:
    """Your own folder (or uncompressed tar) of pictures with captions. Raises: UserError naming the layouts."""
    if root is None or not Path(root).exists():
        raise UserError(f"--data {CAPTION_FOLDER}: --data-root {root} does not exist; give a folder with {_LAYOUT}")
    files = open_files(root)
    if files.has("captions.json"):
        rows = read_json(files, "captions.json")
        items, source = _from_json(rows, split, files), "captions.json"
    elif files.has("captions.csv"):
        items, source = _from_csv(files, split), "captions.csv"
    else:
        items, source = _from_texts(files, split), "*.txt"
    missing = [item.id for item in items if not files.has(item.id)]
    images = [item for item in items if files.has(item.id)]
    if not images:
        raise UserError(f"{root}: no picture with a caption in split {split!r}; expected {_LAYOUT}")
    if missing:
        logger.warning("%s: %d pictures that %s names are missing", root, len(missing), source)
    return Dataset(
        name=CAPTION_FOLDER, split=split, images=images, root=files.root, split_source=source, missing=missing,
        read=files.read,
    )  # fmt: skip


def _from_json(rows: object, split: str, files: Files) -> list[Item]:
    try:
        return [Item(name, None, tuple(row["captions"])) for name, row in rows.items() if row["split"] == split]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{files.root}/captions.json: does not read ({error!r}); expected {_LAYOUT}") from None


def _from_csv(files: Files, split: str) -> list[Item]:
    """A row a caption; without a column "split" every row belongs to train."""
    rows = list(csv.DictReader(io.StringIO(files.read("captions.csv").decode("utf-8-sig"))))
    if not rows or not {"filename", "caption"} <= set(rows[0]):
        raise UserError(f"{files.root}/captions.csv: must have the columns filename and caption; expected {_LAYOUT}")
    texts: dict[str, list[str]] = {}
    for row in rows:
        if (row.get("split") or "train") == split:
            texts.setdefault(row["filename"], []).append(row["caption"] or "")
    return [Item(name, None, tuple(captions)) for name, captions in texts.items()]


def _from_texts(files: Files, split: str) -> list[Item]:
    """`<picture>.txt` beside the picture; without sub-folders train/, val/, test/ all pictures belong to train."""
    names = files.walk()
    folders = {name.split("/")[0] for name in names if "/" in name} & set(_SPLITS)
    if not folders and split != "train":
        return []
    inside = _below(names, f"{split}/") if folders else names
    present = set(inside)
    items = []
    for name in filter(is_image, inside):
        text = str(PurePosixPath(name).with_suffix(".txt"))
        if text in present:
            items.append(Item(name, None, tuple(files.read(text).decode("utf-8", "replace").splitlines())))
    return items


def _below(names: Iterable[str], prefix: str) -> list[str]:
    return [name for name in names if name.startswith(prefix)]
