"""Training pictures as bytes in memory, each opened once, and the small shifts that make them new every epoch.

Letters: B batch, C channel, H rows, W columns.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from patchrank.data import BrokenImage, Dataset
from patchrank.preprocess import Preprocess

MAX_BYTES = 2 << 30
"""Memory for opened pictures; those beyond it are opened again every time."""


def as_bytes(picture: Image.Image) -> Tensor:
    """RGB picture -> uint8 (3, H, W) as it is."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def to_bytes(picture: Image.Image, preprocess: Preprocess) -> Tensor:
    """RGB picture -> uint8 (3, H, W), resized and cropped; with `normalise` this is `preprocess`."""
    raw = replace(preprocess, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return raw(picture).mul(255).round().to(torch.uint8)


class Pictures:
    """Resized and cropped pictures of a data set by index, as uint8; opened at first use, then kept."""

    def __init__(self, dataset: Dataset, preprocess: Preprocess, max_bytes: int = MAX_BYTES) -> None:
        self.dataset = dataset
        self.broken: dict[int, str] = {}
        """Index -> why this picture could not be opened."""
        self._preprocess = preprocess
        self._shape = (3, *preprocess.image_size)
        self._num_kept = min(len(dataset.images), max_bytes // torch.Size(self._shape).numel())
        self._kept: dict[int, Tensor] = {}

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Pictures (B, 3, H, W) uint8 and their indices; broken ones are left out and listed in `broken`."""
        pictures = {number: self._get(number) for number in numbers}
        good = [number for number in numbers if pictures[number] is not None]
        return torch.stack([pictures[number] for number in good]) if good else torch.empty(0, *self._shape), good

    def _get(self, number: int) -> Tensor | None:
        if number in self._kept or number in self.broken:
            return self._kept.get(number)
        try:
            picture = to_bytes(self.dataset.open(self.dataset.images[number].id), self._preprocess)
        except BrokenImage as error:
            self.broken[number] = str(error)
            return None
        if number < self._num_kept:
            self._kept[number] = picture
        return picture


def normalise(image_BCHW: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, the last step of `Preprocess`."""
    mean_C11, std_C11 = (torch.tensor(value)[:, None, None] for value in (preprocess.mean, preprocess.std))
    return image_BCHW.float().div(255).sub(mean_C11).div(std_C11)


def shift(image_BCHW: Tensor, pixels: int, place_B2: Tensor) -> Tensor:
    """Move every picture by up to `pixels` in each direction; the border repeats. Same shape and dtype.

    Args: place (B, 2) int64 in 0 .. 2 pixels, where `pixels` leaves a picture where it was.
    """
    if pixels == 0:
        return image_BCHW
    padded = F.pad(image_BCHW.float(), (pixels,) * 4, mode="replicate").to(image_BCHW.dtype)
    H, W = image_BCHW.shape[2:]
    return torch.stack([picture[:, y : y + H, x : x + W] for picture, (y, x) in zip(padded, place_B2.tolist())])
