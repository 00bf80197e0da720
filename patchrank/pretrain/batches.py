"""What one training step sees: pictures, the distinct texts drawn for them, and which text is true for which picture.

Everything is a function of (config, step, difficulty). Letters: B pictures, U distinct texts, H, W pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchrank.data import Dataset
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.curriculum import CURRICULA
from patchrank.pretrain.draws import generator, sampler
from patchrank.pretrain.objectives import distinct, positives
from patchrank.pretrain.pictures import Pictures, normalise, shift, to_bytes


@dataclass(frozen=True)
class Batch:
    """One step's input."""

    image_BCHW: Tensor
    """float32 (B, 3, H, W), normalised."""
    texts: list[str]
    """U distinct captions."""
    count_U: Tensor
    """float32: how many pictures drew each text."""
    positive_BU: Tensor
    """bool: the text is one of the picture's captions."""


class Batches:
    """Batches of a data set's train split by step."""

    def __init__(self, config: PretrainConfig, dataset: Dataset, preprocess: Preprocess) -> None:
        if config.batch_size > len(dataset.images):
            raise UserError(
                f"--batch-size {config.batch_size}: {dataset.name} has {len(dataset.images)} train pictures; "
                "give a smaller batch"
            )
        if not all(item.captions for item in dataset.images):
            raise UserError(f"--data {dataset.name}: its pictures have no captions; choose a data set with captions")
        self.config = config
        self.preprocess = preprocess
        self.pictures = Pictures(dataset, preprocess)

    def at(self, step: int, difficulty: float) -> Batch:
        """The batch of one step; broken pictures are left out. `difficulty` 1 takes pictures as they are."""
        config, images = self.config, self.pictures.dataset.images
        numbers = sampler(len(images), config.batch_size, config.seed, step).tolist()
        if difficulty < 1.0:
            image_BCHW, captions = self._easier(numbers, step, difficulty)
        else:
            image_BCHW, numbers = self.pictures.batch(numbers)
            captions = [images[number].captions for number in numbers]
        if not captions:
            raise UserError(f"{self.pictures.dataset.name}: every picture of a batch is broken; mend the data set")
        image_BCHW = shift(image_BCHW, config.shift, generator(config.seed, "shift", step))
        chance_B = torch.rand(len(captions), generator=generator(config.seed, "caption", step)).tolist()
        texts, count_U = distinct([own[int(chance * len(own))] for own, chance in zip(captions, chance_B)])
        return Batch(normalise(image_BCHW, self.preprocess), texts, count_U, positives(captions, texts))

    def _easier(self, numbers: list[int], step: int, difficulty: float) -> tuple[Tensor, list[tuple[str, ...]]]:
        draw = CURRICULA[self.config.data]
        rng = np.random.default_rng([self.config.seed, step])
        items = [self.pictures.dataset.images[number] for number in numbers]
        # some pictures stay easier, so that what was learnt is not lost
        drawn = [draw(item, difficulty * (1 - 0.3 * rng.random()), rng) for item in items]
        return torch.stack([to_bytes(picture, self.preprocess) for picture, _ in drawn]), [own for _, own in drawn]
