"""Training pictures at their own size, decoded once where memory allows, and crops of them."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from patchrank.data import BrokenImage, Dataset
from patchrank.pretrain.pictures import as_bytes

MAX_BYTES = 3 << 30
"""Memory for decoded pictures; those beyond it are decoded again every time."""


class Originals:
    """Pictures of a data set by index, RGB, their shorter side at most `most` pixels.

    Args: most: larger pictures are made smaller once (by a whole factor, as JPEG decoders do it), which later crops
    to at most half of it cannot tell.
    """

    def __init__(self, dataset: Dataset, most: int, max_bytes: int = MAX_BYTES) -> None:
        self.dataset = dataset
        self.broken: dict[int, str] = {}
        """Index -> why this picture could not be opened."""
        self._most = most
        self._left = max_bytes
        self._kept: dict[int, Image.Image] = {}

    def get(self, number: int) -> Image.Image | None:
        """One picture; None where it is broken."""
        if number in self._kept or number in self.broken:
            return self._kept.get(number)
        try:
            picture = self.dataset.open(self.dataset.images[number].id)
        except BrokenImage as error:
            self.broken[number] = str(error)
            return None
        factor = min(picture.size) // self._most
        if factor > 1:
            picture = picture.reduce(factor)
        size = 3 * picture.width * picture.height
        if size <= self._left:
            self._kept[number] = picture
            self._left -= size
        return picture


def crop(picture: Image.Image, box: Sequence[int], side: int) -> Tensor:
    """One box (top, left, height, width) of a picture, resized to a square: uint8 (3, side, side).

    Bilinear with antialiasing, by Pillow: on a CPU ten times as fast as matrix products over the whole batch. At its
    edge, pixels beside the box join in.
    """
    top, left, height, width = box
    edges = (left, top, left + width, top + height)
    return as_bytes(picture.resize((side, side), Image.Resampling.BILINEAR, box=edges))
