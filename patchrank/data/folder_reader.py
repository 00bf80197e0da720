"""Reader of any folder of pictures: one sub-folder per class, or flat without labels."""

from patchrank.data.dataset import Item
from patchrank.data.files import Files, is_image
from patchrank.data.listing import Listing, class_folder_items, no_split, readable
from patchrank.errors import UserError

_SPLITS = ("train", "val", "test")


def read_folder(files: Files, split: str) -> Listing:
    """Sub-folders train/, val/, test/ are splits where they are there; without them "test" and "all" are everything.

    Labels follow the sorted class folders of all splits together, so they agree between splits.

    Raises: UserError for an empty folder, a split that is not there, or pictures both beside and in class folders.
    """
    names = [name for name in files.walk() if is_image(name)]
    if not names:
        raise UserError(f"{files.root}: no pictures in this folder; give --data-root a folder with image files")
    tops = {name.split("/")[0] for name in names if "/" in name}
    present = [part for part in _SPLITS if part in tops]
    if split in present:
        folders = [split]
    elif split == "all" or (split == "test" and not present):
        folders = present or [""]
    else:
        raise no_split(files, split, present or ["all"], f"make a sub-folder {split}/ or take one of those")
    below = [name.removeprefix(f"{part}/") for part in present for name in names if name.startswith(f"{part}/")]
    below = below if present else names
    classes = sorted({name.split("/")[0] for name in below if "/" in name})
    flat = [name for name in below if "/" not in name]
    if classes and flat:
        raise UserError(f"{files.root}: {flat[0]} lies beside class folders; use sub-folders for all pictures or none")
    label_of = {name: label for label, name in enumerate(classes)}
    items = []
    for folder in folders:
        prefix = folder + "/" if folder else ""
        unlabelled = [Item(name) for name in names if name.startswith(prefix)]
        items += class_folder_items(files, folder, label_of) if classes else unlabelled
    return Listing(items=items, class_names=[readable(name) for name in classes], source=", ".join(folders) or "all")
