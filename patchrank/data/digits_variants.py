"""The embedded data set under corruptions, and with a wrong caption beside the right one.

They stand in for ImageNet's variants and SugarCrepe where there is no data: same ids, same classes, nothing drawn from
outside the id.
"""

import hashlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from patchrank.data.dataset import Item
from patchrank.data.digits import COLOURS, NAMES, draw_digit, read_digits
from patchrank.data.files import Files
from patchrank.data.listing import Listing

VARIANTS = {"noise": "with strong pixel noise", "blur": "blurred", "contrast": "at 60 % of their contrast"}
"""Name of the corruption -> what it does."""

_NOISE = 40.0
_BLUR = 1.6
_CONTRAST = 0.6


def draw_variant(name: str) -> Callable[[str], Image.Image]:
    """Id -> corrupted canvas; the same id gives the same picture."""
    return {"noise": _noisy, "blur": _blurred, "contrast": _faint}[name]


def _noisy(id: str) -> Image.Image:
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(id.encode()).digest()[:8]))
    pixels = np.asarray(draw_digit(id), dtype=np.float64)
    return Image.fromarray(np.clip(pixels + rng.normal(0, _NOISE, pixels.shape), 0, 255).round().astype(np.uint8))


def _blurred(id: str) -> Image.Image:
    return draw_digit(id).filter(ImageFilter.GaussianBlur(_BLUR))


def _faint(id: str) -> Image.Image:
    return ImageEnhance.Contrast(draw_digit(id)).enhance(_CONTRAST)


def read_digit_pairs(files: Files | None, split: str) -> Listing:
    """Canvases of the test split; captions: the right one, then one with another digit, colour or place.

    Splits: replace_obj (another digit), replace_att (another colour), replace_rel (another corner).
    """
    items = [Item(item.id, item.label, _pair(item, split)) for item in read_digits(files, "test").items]
    return Listing(items=items, class_names=NAMES, source="drawn from scikit-learn's load_digits")


def _pair(item: Item, category: str) -> tuple[str, str]:
    """(right, wrong): the wrong word is the next one in its list."""
    right = item.captions[2] if category == "replace_rel" else item.captions[1]
    words = {"replace_obj": NAMES, "replace_att": list(COLOURS), "replace_rel": ["top", "bottom"]}[category]
    there = next(word for word in words if f" {word}" in right)
    return right, right.replace(f" {there}", f" {words[(words.index(there) + 1) % len(words)]}")
