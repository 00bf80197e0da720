"""Easier pictures first: a transformer without convolutions does not find a small digit in clutter unaided.

A data set with a row in CURRICULA can draw its train pictures at a difficulty from 0 (easiest) to 1 (as they are). The
difficulty rises while the towers keep up, so its state is part of a run's state.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from patchrank.data import Item
from patchrank.data import digits as scene

Easier = Callable[[Item, float, np.random.Generator], tuple[Image.Image, tuple[str, ...]]]
"""(item, difficulty in [0, 1], chance) -> RGB picture, and those of the item's captions that are true for it."""


@dataclass(frozen=True)
class Pace:
    """How hard pictures are, and how often the towers lately found a true caption."""

    difficulty: float = 0.0
    hits: float = 0.0
    """Moving average (0.95) of the share of pictures whose nearest text of the batch is true for them."""

    def after(self, hits: float) -> "Pace":
        """The next step's pace: a two-hundredth harder where the average is above 0.8."""
        average = 0.95 * self.hits + 0.05 * hits
        harder = min(1.0, self.difficulty + 0.005) if average > 0.8 else self.difficulty
        return replace(self, difficulty=harder, hits=average)


def easier_digit(item: Item, difficulty: float, rng: np.random.Generator) -> tuple[Image.Image, tuple[str, ...]]:
    """A train canvas of `patchrank.data.digits` whose digit is larger, nearer the middle, less often in clutter.

    At difficulty 0 the digit fills a clean canvas; at 1 size, place and clutter are drawn as the data set draws them.
    Handwriting is that of the item's split; size and place captions are left out, as they may not hold.
    """
    split, _, number = item.id.partition("/")
    colour, (column, row), height = scene._plan(scene._generator(split, int(number)))
    height = round(scene.SIZE + difficulty * (height - scene.SIZE))
    canvas = scene._background(rng, scene.COLOURS[colour])
    if rng.random() < difficulty:
        scene._clutter(rng, canvas, split)
    ink = scene._ink(rng, split, item.label, height).rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
    left, top = (round((0.5 + difficulty * (share - 0.5)) * (scene.SIZE - height)) for share in (column, row))
    canvas.paste(scene.COLOURS[colour], (left, top, left + height, top + height), ink)
    noise = rng.normal(0, rng.uniform(4, 14), (scene.SIZE, scene.SIZE, 3))
    picture = Image.fromarray(np.clip(np.asarray(canvas) + noise, 0, 255).round().astype(np.uint8))
    return picture, item.captions[:2]


CURRICULA: dict[str, Easier] = {"digits": easier_digit}
