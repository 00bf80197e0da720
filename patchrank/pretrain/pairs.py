"""Pictures with captions, whatever they come from: `load_pairs` reads one data set or a mixture of several.

    flickr8k                        the catalog's captions
    caltech101, food101, folder     class folders: every class name in a few templates
    captions                        your own folder: captions.json, captions.csv, or a .txt beside every picture
    flickr8k+caltech101+food101     a mixture: all pictures of its parts, each as often as it is there
    flickr8k+caltech101/even        of a class set, the classes with an even label (`patchrank.data.halves`)
    3xflickr8k+food101              every picture of flickr8k is there three times

WebDataset shards are a stream and live in `patchrank.pretrain.shards`.
"""

import csv
import io
import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from patchrank.data import CATALOG, Dataset, Item, load_dataset
from patchrank.data.caption_readers import captions_of
from patchrank.data.files import Files, is_image, open_files
from patchrank.data.halves import HALVES
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
_TIMES = re.compile(r"(?:(?P<times>[1-9]\d*)x)?(?P<name>.*)")
_LAYOUT = (
    "captions.json {name: {split, captions}}, captions.csv (filename, caption, split; a row a caption), "
    "or a .txt with a caption a line beside every picture, optionally inside train/, val/, test/"
)


def parts_of(name: str, flag: str = "--data") -> list[str]:
    """Names of a mixture: "a+2xb" -> ["a", "b"]. Raises: UserError, with the flag, for a name that nobody knows."""
    parts = [part for part, _ in _counted(name)]
    known = [*CATALOG, CAPTION_FOLDER, SHARDS]
    for part in parts:
        if part.partition("/")[0] not in known:
            raise UserError(
                f"{flag} {part or repr(name)}: unknown; choose one of {', '.join(known)}, or several joined by +"
            )
    if SHARDS in parts and len(parts) > 1:
        raise UserError(f"{flag} {name}: shards do not mix with others; write the others into shards")
    return parts


def _counted(name: str) -> list[tuple[str, int]]:
    """Names and how often each is there: "a+2xb" -> [("a", 1), ("b", 2)]."""
    matches = [_TIMES.fullmatch(part) for part in name.split("+")]
    return [(match["name"], int(match["times"] or 1)) for match in matches]


def load_pairs(name: str, root: str | Path | None = None, split: str = "train") -> Dataset:
    """One split in which every picture has at least one caption; of a mixture, the parts in their order.

    Blank captions are left out; a picture without any other says UNSAID, counted in the log. Where a part is half of
    the classes, no part's class captions name a class of the other half (`without_names`).
    Raises: UserError for unknown names, absent files, or pictures with neither captions nor classes.
    """
    names = parts_of(name)
    held_out = [one for part in names for one in _other_half(part, root, split)]
    parts = [with_captions(without_names(load_part(part, root, split), held_out)) for part in names]
    times = [times for _, times in _counted(name)]
    return parts[0] if times == [1] else mixture(name, parts, times)


def load_part(name: str, root: str | Path | None, split: str) -> Dataset:
    """One data set of the catalog, or a folder with captions, as its files say it."""
    if name == CAPTION_FOLDER:
        return read_caption_folder(root, split)
    return load_dataset(name, root=root, split=split)


def _other_half(part: str, root: str | Path | None, split: str) -> list[str]:
    """Class names of the half that `<data set>/even` or `/odd` leaves out; none for other parts."""
    name, slash, half = part.partition("/")
    others = [other for other in HALVES if other != half] if slash else []
    return [one for other in others for one in load_part(f"{name}/{other}", root, split).class_names]


def without_names(dataset: Dataset, names: list[str]) -> Dataset:
    """The data set without the pictures of classes named like one of `names`, for whose sake captions would speak.

    Upper case, hyphens and a plural's s do not count. Classes keep their labels.
    """
    plain = {_plain(name) for name in names}
    left_out = {label: name for label, name in enumerate(dataset.class_names) if _plain(name) in plain}
    images = [item for item in dataset.images if item.label not in left_out]
    if len(images) == len(dataset.images):
        return dataset
    logger.warning("%s: %s left out: classes of a half that is not seen", dataset.name, ", ".join(left_out.values()))
    return replace(dataset, images=images)


def _plain(name: str) -> str:
    return name.lower().replace("-", " ").removesuffix("s")


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


def mixture(name: str, parts: list[Dataset], times: list[int] | None = None) -> Dataset:
    """Several data sets as one without classes; ids begin with the part's name.

    Args: times: how often each part's pictures are there; None: once.
    """
    times = times or [1] * len(parts)
    by_name = {part.name: part for part in parts}
    if len(by_name) < len(parts):
        raise UserError(f"--data {name}: names a data set twice; name each once")
    images = [
        Item(f"{part.name}:{item.id}", None, item.captions)
        for part, count in zip(parts, times)
        for item in part.images * count
    ]

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
        return [Item(name, None, captions_of(row["captions"])) for name, row in rows.items() if row["split"] == split]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{files.root}/captions.json: does not read ({error!r}); expected {_LAYOUT}") from None


def _from_csv(files: Files, split: str) -> list[Item]:
    """A row a caption; without a column "split" every row belongs to train."""
    try:
        text = files.read("captions.csv").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{files.root}/captions.csv: is no UTF-8 (byte {error.start}); save it as UTF-8") from None
    rows = list(csv.DictReader(io.StringIO(text)))
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
