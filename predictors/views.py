"""Random views of the training images, so that a frozen tower's features of them are as varied as those of new images.

A tower that was itself trained on these images is surer of them than of others; a crop that it has not seen is not.
"""

import hashlib
import random
from dataclasses import replace

from PIL import Image

from patchrank.data import Dataset

_AREA = (0.5, 1.0)
_RATIO = (3 / 4, 4 / 3)


def random_view(image: Image.Image, draw: random.Random) -> Image.Image:
    """A part of the picture, half to all of its area, mirrored every other time.

    Source: the training crop of Inception (Szegedy et al. 2015, section 6), with a larger least area.
    """
    width, height = image.size
    area, ratio = draw.uniform(*_AREA) * width * height, draw.uniform(*_RATIO)
    wide, high = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
    left, top = draw.randint(0, width - wide), draw.randint(0, height - high)
    view = image.crop((left, top, left + wide, top + high))
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else view


def viewed(dataset: Dataset, seed: int) -> Dataset:
    """The same data set with one random view of each picture, a function of seed and id alone."""

    def read(image_id: str) -> Image.Image:
        words = hashlib.sha256(f"{seed}:{image_id}".encode()).hexdigest()
        return random_view(dataset.open(image_id), random.Random(words))

    return replace(dataset, read=read, name=f"{dataset.name}, views {seed}")
