"""Readers of ImageNet's variants for robustness: V2, A, O, R and Sketch; names and label order as in CLIP_benchmark.

V2 and Sketch have all 1,000 classes; A, O and R have 200, and labels count these alone, in the order of their wnids.
"""

from collections.abc import Callable
from functools import partial
from importlib.resources import files as package_files

from patchrank.data.dataset import Item
from patchrank.data.files import Files, is_image
from patchrank.data.imagenet_readers import imagenet_names, imagenet_wnids
from patchrank.data.listing import Listing, class_folder_items, no_split
from patchrank.errors import UserError


def read_imagenet_v2(files: Files, split: str) -> Listing:
    """Folders named by label: 0/ .. 999/ (as text they would sort wrongly)."""
    items = []
    for name in filter(is_image, files.walk()):
        folder = name.split("/")[0]
        if not folder.isdecimal() or int(folder) >= 1000:
            raise UserError(f"{files.root}/{name}: not in a folder named 0 to 999; fetch the official archive again")
        items.append(Item(name, int(folder)))
    items.sort(key=lambda item: (item.label, item.id))
    return Listing(items=items, class_names=imagenet_names(), source="0/ .. 999/")


def _subset(name: str) -> list[str]:
    """The 200 wnids of ImageNet-A or -R, sorted, from the list inside timm."""
    lines = (package_files("timm") / "data" / "_info" / f"imagenet_{name}_synsets.txt").read_text(encoding="utf-8")
    return sorted(lines.split())


def _read_wnids(
    files: Files, split: str, *, inside: tuple[str, ...], classes: Callable[[], list[str]] | None
) -> Listing:
    """Class folders named by wnid, at the root or in one of `inside`.

    Args: classes, their wnids in label order; None: those whose folders are there.
    """
    name_of = dict(zip(imagenet_wnids(), imagenet_names()))
    for folder in ("", *inside):
        prefix = folder + "/" if folder else ""
        there = {name.removeprefix(prefix).split("/")[0] for name in files.walk(folder) if is_image(name)}
        present = sorted(there & set(name_of))
        if present:
            wnids = present if classes is None else classes()
            items = class_folder_items(files, folder, {wnid: label for label, wnid in enumerate(wnids)})
            return Listing(
                items=items, class_names=[name_of[wnid] for wnid in wnids], source=f"{folder or '.'}/<wnid>/"
            )
    raise no_split(files, split, [], "expected one folder per wnid; unpack the official archive there")


read_imagenet_a = partial(_read_wnids, inside=("imagenet-a",), classes=partial(_subset, "a"))
read_imagenet_r = partial(_read_wnids, inside=("imagenet-r",), classes=partial(_subset, "r"))
read_imagenet_o = partial(_read_wnids, inside=("imagenet-o",), classes=None)
read_imagenet_sketch = partial(_read_wnids, inside=("sketch", "images"), classes=imagenet_wnids)
