"""The embedded data set: real handwritten digits on cluttered canvases, drawn on demand from the id alone.

Each canvas (112 x 112, RGB) has one digit of scikit-learn's bundled handwriting (8 x 8, UCI "Optical Recognition of
Handwritten Digits") at a random place, size, tilt and colour, in front of strokes, pieces of other digits and noise:
most patches say nothing about the class, so pruning has something to find. Train, val and test draw from disjoint
handwriting. Same id, same picture, in any order and any process.
"""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from patchrank.data.dataset import Item
from patchrank.data.files import Files
from patchrank.data.listing import Listing

SIZE = 112
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = {
    "red": (215, 35, 40),
    "orange": (240, 140, 25),
    "yellow": (245, 220, 50),
    "green": (30, 150, 60),
    "blue": (40, 70, 215),
    "purple": (140, 50, 170),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
NUM_IMAGES = {"train": 20_000, "val": 1_000, "test": 2_000}
_SHARES = {"train": (0.0, 0.7), "val": (0.7, 0.8), "test": (0.8, 1.0)}
_SEED = 20_261
_CONTRAST = [min(255, max(0, 2 * (value - 64))) for value in range(256)]


def read_digits(files: Files | None, split: str) -> Listing:
    """All ids of a split; labels take turns, so every run of ten ids has every class once."""
    return Listing(items=list(_items(split)), class_names=NAMES, source="drawn from scikit-learn's load_digits")


@cache
def _items(split: str) -> tuple[Item, ...]:
    """All items of a split; each needs a generator of its own, so they are made once."""
    return tuple(_item(split, number) for number in range(NUM_IMAGES[split]))


def draw_digit(id: str) -> Image.Image:
    """RGB canvas of one id such as "test/000123". Raises: OSError for an id that no split has."""
    split, _, number = id.partition("/")
    if split not in NUM_IMAGES or not number.isdecimal() or int(number) >= NUM_IMAGES[split]:
        raise FileNotFoundError(f"no such canvas: {id}")
    rng = _generator(split, int(number))
    colour, (column, row), height = _plan(rng)
    canvas = _background(rng, COLOURS[colour])
    _clutter(rng, canvas, split)
    ink = _ink(rng, split, int(number) % 10, height).rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
    place = (round(column * (SIZE - height)), round(row * (SIZE - height)))
    canvas.paste(COLOURS[colour], (*place, place[0] + height, place[1] + height), ink)
    noise = rng.normal(0, rng.uniform(4, 14), (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(canvas) + noise, 0, 255).round().astype(np.uint8))


def _generator(split: str, number: int) -> np.random.Generator:
    return np.random.default_rng([_SEED, list(NUM_IMAGES).index(split), number])


def _plan(rng: np.random.Generator) -> tuple[str, tuple[float, float], int]:
    """Colour name, place (column, row) in [0, 1) of the free range, and height in pixels; the first draws of an id."""
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    return colour, (rng.random(), rng.random()), int(rng.integers(36, 73))


def _item(split: str, number: int) -> Item:
    colour, (column, row), height = _plan(_generator(split, number))
    name = NAMES[number % 10]
    size = "small" if height < 54 else "large"
    place = f"{('top', 'bottom')[row >= 0.5]} {('left', 'right')[column >= 0.5]}"
    captions = (
        f"a photo of the digit {name}",
        f"a {colour} {name}",
        f"a {size} {colour} digit {name} at the {place}",
        f"the handwritten digit {name} at the {place}",
    )
    return Item(f"{split}/{number:06d}", number % 10, captions)


@cache
def _handwriting() -> dict[str, list[np.ndarray]]:
    """Split -> for each class its own source digits (n, 8, 8) in [0, 1]; no digit is in two splits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(_SEED).permutation(len(bunch.target))
    by_class = [order[bunch.target[order] == label] for label in range(10)]
    return {
        split: [bunch.images[own[round(low * len(own)) : round(high * len(own))]] / 16 for own in by_class]
        for split, (low, high) in _SHARES.items()
    }


def _ink(rng: np.random.Generator, split: str, label: int, height: int) -> Image.Image:
    """One source digit as an opacity mask (height, height)."""
    pool = _handwriting()[split][label]
    opacity = np.pad(pool[rng.integers(len(pool))], 1)
    mask = Image.fromarray((opacity * 255).astype(np.uint8)).resize((height, height), Image.Resampling.BICUBIC)
    return mask.point(_CONTRAST)


def _background(rng: np.random.Generator, ink: tuple[int, int, int]) -> Image.Image:
    """Soft colours, dark behind light ink and light behind dark ink."""
    luminance = 0.299 * ink[0] + 0.587 * ink[1] + 0.114 * ink[2]
    base = rng.uniform(20, 90) if luminance > 110 else rng.uniform(165, 230)
    coarse = np.clip(base + rng.normal(0, 22, (5, 5, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _clutter(rng: np.random.Generator, canvas: Image.Image, split: str) -> None:
    """Strokes and arcs, and pieces of digits too small to be read."""
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(4, 10)):
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        x, y, x_end, y_end = (int(value) for value in rng.integers(0, SIZE, 4))
        if rng.random() < 0.5:
            pen.line((x, y, x_end, y_end), fill=colour, width=int(rng.integers(1, 4)))
        else:
            start = int(rng.integers(0, 360))
            box = (x - 20, y - 20, x + 5 + x_end // 3, y + 5 + y_end // 3)
            pen.arc(box, start, start + int(rng.integers(40, 150)), fill=colour, width=int(rng.integers(1, 4)))
    for _ in range(rng.integers(6, 15)):
        height = int(rng.integers(30, 73))
        piece = height * 2 // 5
        left, top = (int(value) for value in rng.integers(height // 8, height - piece - height // 8 + 1, 2))
        mask = _ink(rng, split, int(rng.integers(10)), height).crop((left, top, left + piece, top + piece))
        x, y = (int(value) for value in rng.integers(-piece // 2, SIZE - piece // 2, 2))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        canvas.paste(colour, (x, y, x + piece, y + piece), mask)
