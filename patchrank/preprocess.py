"""From a picture to the numbers that a frozen tower was trained on: RGB, resize, centre crop, normalise.

One pure class stands for open_clip's `image_transform(is_train=False)` and timm's evaluation transform, without
torchvision; it is saved beside every result, so that a store says what its towers saw.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchrank.errors import UserError

_INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_MODES = ("shortest", "squash")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Picture -> float32 (3, H, W), normalised; equal to open_clip's and timm's transform bit by bit.

    Deviation: pictures become RGB before the resize; open_clip resizes first, which differs for palette images only.

    Raises: UserError for an unknown mode or interpolation, or a resize smaller than the crop.
    """

    image_size: tuple[int, int]
    """Rows and columns (H, W) of the centre crop, in pixels."""
    resize: int | tuple[int, int]
    """Target before the crop: of the shorter side (int), or (H, W) to cover (mode shortest) or to fill (squash)."""
    mode: str = "shortest"
    """"shortest" keeps the aspect ratio, "squash" does not."""
    interpolation: str = "bicubic"
    mean: tuple[float, float, float]
    """Per channel R, G, B, in units of [0, 1]."""
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise UserError(f"mode {self.mode!r}: unknown way to resize; choose one of {', '.join(_MODES)}")
        if self.interpolation not in _INTERPOLATIONS:
            known = ", ".join(_INTERPOLATIONS)
            raise UserError(f"interpolation {self.interpolation!r}: unknown filter; choose one of {known}")
        height, width = self.resize if isinstance(self.resize, tuple) else (self.resize, self.resize)
        if height < self.image_size[0] or width < self.image_size[1]:
            raise UserError(f"resize {self.resize}: must cover the crop {self.image_size}; give a larger resize")

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image of any mode -> float32 (3, H, W)."""
        image = self._cropped(self._resized(image.convert("RGB")))
        pixels_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        mean_C11, std_C11 = (torch.tensor(value, dtype=torch.float32)[:, None, None] for value in (self.mean, self.std))
        return pixels_CHW.sub(mean_C11).div(std_C11)

    def _resized(self, image: Image.Image) -> Image.Image:
        width, height = _target(image.size, self.resize, self.mode)
        if (width, height) == image.size:
            return image
        return image.resize((width, height), _INTERPOLATIONS[self.interpolation])

    def _cropped(self, image: Image.Image) -> Image.Image:
        height, width = self.image_size
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal object back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocess":
        """Inverse of `to_dict`.

        Raises: UserError for missing or extra keys.
        """
        names = set(cls.__dataclass_fields__)
        if set(values) != names:
            raise UserError(f"preprocess keys {sorted(values)}: expected {sorted(names)}; write it again with to_dict")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _target(size: tuple[int, int], resize: int | tuple[int, int], mode: str) -> tuple[int, int]:
    """(width, height) after the resize of a picture of `size` (width, height)."""
    height, width = resize if isinstance(resize, tuple) else (resize, resize)
    if mode == "squash":
        return width, height
    if height == width:
        short, long = min(size), int(height * max(size) / min(size))
        return (height, long) if size[0] == short else (long, height)
    ratio = min(size[0] / width, size[1] / height)
    return round(size[0] / ratio), round(size[1] / ratio)
