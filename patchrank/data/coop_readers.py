"""Readers of the classification sets of the prompt-learning papers: CoOp's split file where it is there, else official.

CoOp's split of Flowers102 and DTD is not the official one; `Listing.source` says which was read.
"""

import io
import re
from functools import partial

import numpy as np

from patchrank.data.dataset import Item
from patchrank.data.files import Files, is_image
from patchrank.data.listing import Listing, Reader, first_present, no_split, read_json, read_lines, readable
from patchrank.errors import UserError

_CALTECH_TRAIN = 30
"""Pictures of each class that TensorFlow Datasets draws for train."""


def coop(split_file: str, folder: str, official: Reader | None = None) -> Reader:
    """Reader of `split_file` with pictures below `folder`; `official` takes over where that file is absent.

    The file: {train, val, test: [[path, label from 0, class name], ...]}.
    """
    return partial(_read_coop, split_file=split_file, folder=folder, official=official)


def _read_coop(files: Files, split: str, *, split_file: str, folder: str, official: Reader | None) -> Listing:
    if not files.has(split_file):
        if official is None:
            raise UserError(f"{files.root}: no {split_file}, which defines the splits; put CoOp's file there")
        return official(files, split)
    rows = read_json(files, split_file)
    names = {label: name for part in ("train", "val", "test") for _, label, name in rows[part]}
    items = [Item(f"{folder}/{path}", label) for path, label, _ in rows[split]]
    class_names = [readable(names[label]) for label in range(len(names))]
    return Listing(items=items, class_names=class_names, source=split_file)


def _official_file(files: Files, split: str, table: dict[str, str], split_file: str) -> str:
    """The official file of one split. Raises: UserError where there is none."""
    if split not in table:
        raise no_split(files, split, table, f"put CoOp's {split_file} there for all three")
    if not files.has(table[split]):
        raise UserError(f"{files.root}: neither {split_file} nor {table[split]}; fetch one of them")
    return table[split]


def read_caltech(files: Files, split: str) -> Listing:
    """All 102 class folders, background among them; 30 pictures of each drawn for train, the rest is test.

    Source: TensorFlow Datasets' `caltech101`, which VTAB and CLIP_benchmark read: NumPy's generator seeded with 1234,
    one draw a class. Deviation: there the order of folders and files is that of the file system, here it is sorted, so
    counts (3,060 / 6,084) and chances are the same, the pictures are not.
    """
    folder = "101_ObjectCategories"
    if split not in ("train", "test"):
        raise no_split(files, split, ("train", "test"), "put CoOp's split_zhou_Caltech101.json there for all three")
    by_class: dict[str, list[str]] = {}
    for name in filter(is_image, files.walk(folder)):
        by_class.setdefault(name.split("/")[1], []).append(name)
    draw, items = np.random.RandomState(1234), []
    names = sorted(by_class, key=str.lower)
    for label, name in enumerate(names):
        if len(by_class[name]) <= _CALTECH_TRAIN:
            raise UserError(f"{files.root}/{folder}/{name}: fewer than 31 pictures; unpack the official archive again")
        train = set(draw.choice(by_class[name], _CALTECH_TRAIN, replace=False).tolist())
        items += [Item(id, label) for id in by_class[name] if (id in train) == (split == "train")]
    return Listing(items=items, class_names=[readable(name.lower()) for name in names], source=f"{folder}/, drawn")


def read_pets(files: Files, split: str) -> Listing:
    """annotations/trainval.txt and test.txt: `Abyssinian_100 1 1 1` (name, class id from 1, ...)."""
    table = {"train": "annotations/trainval.txt", "test": "annotations/test.txt"}
    source = _official_file(files, split, table, "split_zhou_OxfordPets.json")
    rows = [line.split() for line in read_lines(files, source) if not line.startswith("#")]
    names = {int(row[1]) - 1: row[0].rsplit("_", 1)[0].lower() for row in rows}
    items = [Item(f"images/{row[0]}.jpg", int(row[1]) - 1) for row in rows]
    return Listing(items=items, class_names=[readable(names[label]) for label in sorted(names)], source=source)


def read_flowers(files: Files, split: str) -> Listing:
    """setid.mat (trnid, valid, tstid), imagelabels.mat (labels from 1) and cat_to_name.json."""
    from scipy.io import loadmat

    split_file = "split_zhou_OxfordFlowers.json"
    source = _official_file(files, split, dict.fromkeys(("train", "val", "test"), "setid.mat"), split_file)
    absent = [name for name in ("imagelabels.mat", "cat_to_name.json") if not files.has(name)]
    if absent:
        raise UserError(f"{files.root}: {' and '.join(absent)} missing beside setid.mat; fetch them or {split_file}")
    key = {"train": "trnid", "val": "valid", "test": "tstid"}[split]
    numbers = loadmat(io.BytesIO(files.read(source)))[key].ravel().tolist()
    labels = loadmat(io.BytesIO(files.read("imagelabels.mat")))["labels"].ravel().tolist()
    names = {int(label): name for label, name in read_json(files, "cat_to_name.json").items()}
    items = [Item(f"jpg/image_{number:05d}.jpg", labels[number - 1] - 1) for number in numbers]
    return Listing(items=items, class_names=[readable(names[label]) for label in sorted(names)], source=source)


def read_food(files: Files, split: str) -> Listing:
    """meta/train.json and test.json: {class: [class/number, ...]}; classes in alphabetical order."""
    table = {"train": "meta/train.json", "test": "meta/test.json"}
    source = _official_file(files, split, table, "split_zhou_Food101.json")
    rows = read_json(files, source)
    names = sorted(rows)
    items = [Item(f"images/{path}.jpg", label) for label, name in enumerate(names) for path in rows[name]]
    return Listing(items=items, class_names=[readable(name) for name in names], source=source)


def read_dtd(files: Files, split: str) -> Listing:
    """labels/train1.txt, val1.txt, test1.txt (the first of ten official partitions): `banded/banded_0002.jpg`."""
    table = {part: f"labels/{part}1.txt" for part in ("train", "val", "test")}
    source = _official_file(files, split, table, "split_zhou_DescribableTextures.json")
    parts = {part: read_lines(files, name) for part, name in table.items() if files.has(name)}
    names = sorted({line.split("/")[0] for lines in parts.values() for line in lines})
    items = [Item(f"images/{line}", names.index(line.split("/")[0])) for line in parts[split]]
    return Listing(items=items, class_names=[readable(name) for name in names], source=source)


def read_ucf(files: Files, split: str) -> Listing:
    """ucfTrainTestlist/: classInd.txt (`1 ApplyEyeMakeup`), trainlist01.txt, testlist01.txt; mid-frames as .jpg."""
    table = {"train": "ucfTrainTestlist/trainlist01.txt", "test": "ucfTrainTestlist/testlist01.txt"}
    source = _official_file(files, split, table, "split_zhou_UCF101.json")
    names = [line.split()[1] for line in read_lines(files, "ucfTrainTestlist/classInd.txt")]
    # The official lists write one class in two ways (HandStandPushups, HandstandPushups).
    label_of = {name.lower(): label for label, name in enumerate(names)}
    items = []
    for line in read_lines(files, source):
        action, video = line.split()[0].split("/")
        path = f"UCF-101-midframes/{_spaced(action, '_')}/{video.removesuffix('.avi')}.jpg"
        items.append(Item(path, label_of[action.lower()]))
    return Listing(items=items, class_names=[_spaced(name, " ") for name in names], source=source)


def _spaced(name: str, space: str) -> str:
    """ApplyEyeMakeup -> Apply Eye Makeup."""
    return space.join(re.findall("[A-Z][^A-Z]*", name))


def read_aircraft(files: Files, split: str) -> Listing:
    """images_variant_<split>.txt: `1025794 707-320`; variants.txt gives the label order; at the root or in data/."""
    variants = first_present(files, ("variants.txt", "data/variants.txt"))
    if variants is None:
        raise UserError(f"{files.root}: no variants.txt; unpack the official archive there")
    folder = variants.removesuffix("variants.txt")
    source = f"{folder}images_variant_{split}.txt"
    if not files.has(source):
        raise UserError(f"{files.root}: no {source}; unpack the official archive there")
    names = read_lines(files, variants)
    rows = [line.split(" ", 1) for line in read_lines(files, source)]
    items = [Item(f"{folder}images/{number}.jpg", names.index(name)) for number, name in rows]
    return Listing(items=items, class_names=names, source=source)
