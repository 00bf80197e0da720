"""Readers of ImageNet and Tiny-ImageNet: WordNet ids (wnids) as folder names, readable names from elsewhere."""

import csv

from patchrank.data.dataset import Item
from patchrank.data.files import Files, is_image
from patchrank.data.listing import Listing, class_folder_items, first_present, no_split, read_json, read_lines
from patchrank.errors import UserError


def read_tiny_imagenet(files: Files, split: str) -> Listing:
    """Official layout (train/<wnid>/images, val/images + val_annotations.txt) or class folders in both splits.

    Label order: `classes.json` ([{"wnid", "name"}, ...]) where it is there, else the sorted wnids of `wnids.txt`.
    A class is named by its first synonym.
    """
    if files.has("classes.json"):
        rows = read_json(files, "classes.json")
        wnids, names = [row["wnid"] for row in rows], [row["name"] for row in rows]
    elif files.has("wnids.txt") and files.has("words.txt"):
        wnids = sorted(read_lines(files, "wnids.txt"))
        words = dict(line.split("\t", 1) for line in read_lines(files, "words.txt"))
        names = [words.get(wnid, wnid) for wnid in wnids]
    else:
        raise UserError(f"{files.root}: neither classes.json nor wnids.txt and words.txt; fetch the official files")
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    annotations = "val/val_annotations.txt"
    if split == "val" and files.has(annotations):
        rows = [line.split("\t") for line in read_lines(files, annotations)]
        items, source = [Item(f"val/images/{row[0]}", label_of[row[1]]) for row in rows], annotations
    else:
        items, source = class_folder_items(files, split, label_of), f"{split}/"
    return Listing(items=items, class_names=[name.split(",")[0] for name in names], source=source)


def imagenet_wnids() -> list[str]:
    """The 1,000 wnids in label order (sorted), from timm."""
    from patchrank.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_names()


def imagenet_names() -> list[str]:
    """OpenAI's curated 1,000 class names in label order, from open_clip."""
    from patchrank.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def read_imagenet(files: Files, split: str) -> Listing:
    """Class folders <split>/<wnid>/ at the root, under `images/` (CoOp) or under `ILSVRC/Data/CLS-LOC/` (Kaggle).

    Kaggle's flat val folder takes its labels from `LOC_val_solution.csv`. Labels are places in the full list of
    1,000 classes, also where only some folders are there.
    """
    label_of = {wnid: label for label, wnid in enumerate(imagenet_wnids())}
    for folder in (split, f"images/{split}", f"ILSVRC/Data/CLS-LOC/{split}"):
        items = class_folder_items(files, folder, label_of)
        if items:
            return Listing(items=items, class_names=imagenet_names(), source=f"{folder}/")
        solution = first_present(files, ("LOC_val_solution.csv", "ILSVRC/LOC_val_solution.csv"))
        if split == "val" and solution and any(map(is_image, files.walk(folder))):
            rows = list(csv.reader(read_lines(files, solution)))[1:]
            items = [Item(f"{folder}/{row[0]}.JPEG", label_of[row[1].split()[0]]) for row in rows]
            return Listing(items=items, class_names=imagenet_names(), source=solution)
    raise no_split(files, split, [], f"expected {split}/<wnid>/*.JPEG; sort the official archives into class folders")
