"""Readers of pictures with captions: Karpathy's split files, the official files, and a plain `captions.json`."""

import re
from functools import partial

from patchrank.data.dataset import Item
from patchrank.data.files import Files
from patchrank.data.listing import Listing, Reader, first_present, no_split, read_json, read_lines
from patchrank.errors import UserError


def captions(karpathy: str, folders: tuple[str, ...], official: Reader | None = None) -> Reader:
    """Reader of `captions.json` or of Karpathy's file, else `official`; pictures lie in the first fitting folder."""
    return partial(_read_captions, karpathy=karpathy, folders=folders, official=official)


def _read_captions(
    files: Files, split: str, *, karpathy: str, folders: tuple[str, ...], official: Reader | None
) -> Listing:
    source = first_present(files, ("captions.json", karpathy, f"annotations/{karpathy}"))
    if source is None:
        if official is None:
            raise UserError(
                f"{files.root}: no {karpathy}, which defines splits and captions; put Karpathy's file there"
            )
        return official(files, split)
    rows = read_json(files, source)
    rows = _plain(rows, split) if source == "captions.json" else _karpathy(rows, split)
    return Listing(items=_below(files, rows, folders), source=source)


def _plain(rows: dict, split: str) -> dict[str, tuple[str, ...]]:
    """{name: {split, captions}} -> name -> captions."""
    return {name: captions_of(row["captions"]) for name, row in rows.items() if row["split"] == split}


def captions_of(value: object) -> tuple[str, ...]:
    """Captions of a picture from JSON: one text, or a list of texts. Raises: UserError for anything else."""
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"captions.json: captions {str(value)[:60]} must be a text or a list of texts")
    return tuple(texts)


def _karpathy(rows: dict, split: str) -> dict[str, tuple[str, ...]]:
    """Karpathy's file -> name -> captions; his `restval` of COCO belongs to train, as in the papers."""
    parts = ("train", "restval") if split == "train" else (split,)
    return {
        "/".join(filter(None, (row.get("filepath", ""), row["filename"]))): tuple(
            sentence["raw"].strip() for sentence in row["sentences"]
        )
        for row in rows["images"]
        if row["split"] in parts
    }


def _below(files: Files, rows: dict[str, tuple[str, ...]], folders: tuple[str, ...]) -> list[Item]:
    """Items below the first folder that has any of the pictures ("" is the root)."""
    prefixes = [folder + "/" if folder else "" for folder in folders]
    present = (prefix for prefix in prefixes if any(files.has(prefix + name) for name in rows))
    prefix = next(present, prefixes[0])
    return [Item(prefix + name, None, texts) for name, texts in rows.items()]


def read_flickr8k(files: Files, split: str) -> Listing:
    """Flickr8k.token.txt (`name.jpg#0<tab>caption`), Flickr_8k.{train,dev,test}Images.txt; or below Flickr8k_text/."""
    part = {"train": "train", "val": "dev", "test": "test"}[split]
    tokens, source = "Flickr8k.token.txt", f"Flickr_8k.{part}Images.txt"
    folder = "" if files.has(tokens) else "Flickr8k_text/"
    if not (files.has(folder + tokens) and files.has(folder + source)):
        raise UserError(
            f"{files.root}: no {tokens} and {source}, captions.json or dataset_flickr8k.json; put one there"
        )
    texts: dict[str, list[str]] = {}
    for line in read_lines(files, folder + tokens):
        key, _, caption = line.partition("\t")
        texts.setdefault(re.sub(r"#\d+$", "", key), []).append(caption.strip())
    rows = {name: tuple(texts.get(name, ())) for name in read_lines(files, folder + source)}
    return Listing(items=_below(files, rows, ("Flicker8k_Dataset", "images")), source=folder + source)


def read_coco(files: Files, split: str) -> Listing:
    """annotations/captions_<split>2017.json with train2017/ and val2017/; official test captions are not public."""
    source = f"annotations/captions_{split}2017.json"
    if not files.has(source):
        known = [part for part in ("train", "val") if files.has(f"annotations/captions_{part}2017.json")]
        raise no_split(files, split, known, "put Karpathy's dataset_coco.json there for all three")
    content = read_json(files, source)
    texts: dict[int, list[str]] = {}
    for row in content["annotations"]:
        texts.setdefault(row["image_id"], []).append(row["caption"].strip())
    rows = {row["file_name"]: tuple(texts.get(row["id"], ())) for row in content["images"]}
    return Listing(items=_below(files, rows, (f"{split}2017", f"images/{split}2017")), source=source)
