"""Bytes that a stranger sent -> the uint8 picture that a graph takes; limits are checked before anything is decoded.

A picture of a few kilobytes can claim gigapixels (a decompression bomb), so its size is read from the header first.
"""

import io
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageOps

from export.source import pixels
from patchrank.preprocess import Preprocess

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Decoders that a request may reach; of an animation the first picture counts."""


class BadImage(ValueError):
    """Bytes that are no picture within the limits; answered with status 400."""


class TooManyPixels(BadImage):
    """A picture over the pixel limit; answered with status 413."""


@dataclass(frozen=True)
class Decoded:
    """A picture at the model's size, and where it lay in the one that was sent."""

    image_HW3: np.ndarray
    """uint8."""
    size: tuple[int, int]
    """Width and height of the upright picture that was sent."""
    crop: tuple[float, float, float, float]
    """Left, top, width, height of what the model sees, in pixels of that picture."""


@dataclass(frozen=True)
class ImageReader:
    """Encoded bytes -> `Decoded`, by a model's own resize and crop."""

    preprocess: Preprocess
    max_pixels: int

    @cached_property
    def _transform(self) -> Preprocess:
        return pixels(self.preprocess)

    def __call__(self, data: bytes) -> Decoded:
        """Deviation from `Preprocess`: a picture that a camera marked as rotated is turned upright first.

        Raises: BadImage.
        """
        picture = self._open(data)
        picture_3HW = self._transform(picture)
        image_HW3 = (picture_3HW * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        return Decoded(image_HW3, picture.size, crop_of(picture.size, self.preprocess))

    def _open(self, data: bytes) -> Image.Image:
        if not data:
            raise BadImage("the body is empty; send the bytes of a picture")
        try:
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise TooManyPixels(f"the picture has more than {self.max_pixels} pixels") from error
        except Exception as error:  # decoders answer damaged bytes with almost any exception
            raise BadImage(f"the body is no picture of the kinds {', '.join(FORMATS)}") from error
        width, height = picture.size
        if width * height > self.max_pixels:
            raise TooManyPixels(f"{width} x {height}: has more than {self.max_pixels} pixels; send a smaller picture")
        if max(width, height) > 100 * min(width, height):
            raise BadImage(f"{width} x {height}: is too long for its width; crop it")
        try:
            return ImageOps.exif_transpose(picture).convert("RGB")
        except Exception as error:
            raise BadImage(f"the {picture.format} picture is damaged ({type(error).__name__})") from error


def crop_of(size: tuple[int, int], preprocess: Preprocess) -> tuple[float, float, float, float]:
    """Left, top, width and height of the crop in pixels of a picture of `size` (width, height), before its resize."""
    resize = preprocess.resize if isinstance(preprocess.resize, tuple) else (preprocess.resize,) * 2
    rows, columns = preprocess.image_size
    across, down = resize[1] / size[0], resize[0] / size[1]
    if preprocess.mode == "shortest":
        across = down = max(across, down)
    width, height = columns / across, rows / down
    return (size[0] - width) / 2, (size[1] - height) / 2, width, height
