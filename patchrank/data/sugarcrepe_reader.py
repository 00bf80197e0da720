"""Reader of SugarCrepe: a picture, its caption, and a caption that is wrong in one thing; a category is a split.

Source: Hsieh et al. 2023, "SugarCrepe: Fixing Hackable Benchmarks for Vision-Language Compositionality".
"""

from patchrank.data.dataset import Item
from patchrank.data.files import Files
from patchrank.data.listing import Listing, first_present, read_json
from patchrank.errors import UserError

CATEGORIES = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")


def read_sugarcrepe(files: Files, split: str) -> Listing:
    """data/<category>.json: {"0": {filename, caption, negative_caption}, ...}; keys may have gaps.

    Captions of an item: the right one, then the wrong one. Pictures in val2017/ or at the root.
    """
    places = (f"data/{split}.json", f"{split}.json", f"sugar_crepe/{split}.json", f"annotations/{split}.json")
    source = first_present(files, places)
    if source is None:
        raise UserError(f"{files.root}: no data/{split}.json; put the JSON files of SugarCrepe there")
    rows = list(read_json(files, source).values())
    folders = ("val2017/", "images/val2017/", "images/", "")
    folder = next(
        (folder for folder in folders if any(files.has(folder + row["filename"]) for row in rows)), folders[0]
    )
    items = [Item(folder + row["filename"], None, (row["caption"], row["negative_caption"])) for row in rows]
    return Listing(items=items, source=source)
