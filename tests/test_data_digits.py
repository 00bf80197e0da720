"""The embedded data set: reproducible by id, disjoint handwriting, captions that tell the truth."""

import hashlib

import numpy as np
import pytest

from patchrank.data import BrokenImage, load_dataset
from patchrank.data.digits import COLOURS, NAMES, NUM_IMAGES, _handwriting, draw_digit


@pytest.mark.parametrize("split", NUM_IMAGES)
def test_listing(split):
    dataset = load_dataset("digits", split=split)
    assert len(dataset.images) == NUM_IMAGES[split]
    assert [item.id for item in dataset.images[:2]] == [f"{split}/000000", f"{split}/000001"]
    assert np.bincount([item.label for item in dataset.images]).tolist() == [NUM_IMAGES[split] // 10] * 10
    for item in dataset.images[:40]:
        name = NAMES[item.label]
        assert item.captions[0] == f"a photo of the digit {name}"
        assert all(name in caption for caption in item.captions)
        assert any(colour in item.captions[1] for colour in COLOURS)


def test_an_id_is_one_picture_in_any_order():
    ids = [f"test/{number:06d}" for number in (5, 123, 7, 1999)]
    dataset = load_dataset("digits")
    forward = [dataset.open(id).tobytes() for id in ids]
    backward = [draw_digit(id).tobytes() for id in reversed(ids)][::-1]
    assert forward == backward
    assert len(set(forward)) == len(ids)
    image = dataset.open(ids[0])
    assert image.size == (112, 112) and image.mode == "RGB"


def test_same_number_differs_between_splits():
    assert len({draw_digit(f"{split}/000000").tobytes() for split in NUM_IMAGES}) == 3


def test_handwriting_is_disjoint_and_complete():
    sources = [[image.tobytes() for own in by_class for image in own] for by_class in _handwriting().values()]
    distinct = [{hashlib.sha256(source).digest() for source in part} for part in sources]
    assert sum(map(len, sources)) == 1797
    assert not (distinct[0] & distinct[1] or distinct[0] & distinct[2] or distinct[1] & distinct[2])
    assert all(len(own) >= 15 for by_class in _handwriting().values() for own in by_class)


def test_the_digit_stands_where_the_caption_says():
    """Forty canvases whose pure-colour pixels (clutter has random colours) lie in the named half, on average."""
    dataset = load_dataset("digits")
    agree = 0
    for item in dataset.images[:40]:
        colour = next(name for name in COLOURS if name in item.captions[1])
        pixels = np.asarray(dataset.open(item.id)).astype(int)
        near = np.abs(pixels - COLOURS[colour]).max(-1) < 25
        rows, columns = np.nonzero(near)
        agree += ("bottom" in item.captions[2]) == (rows.mean() >= 56)
        agree += ("right" in item.captions[2]) == (columns.mean() >= 56)
    assert agree >= 72


@pytest.mark.parametrize("id", ["test/002000", "dev/000001", "test/x", "test"])
def test_unknown_ids(id):
    with pytest.raises(BrokenImage):
        load_dataset("digits").open(id)
