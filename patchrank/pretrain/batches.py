"""What one training step sees: views of pictures, the distinct texts drawn for them, and which text is true for which.

Everything is a function of (config, step, part, difficulty). A step's batch is drawn as a whole and then cut into equal
parts, by process and by accumulation; so the pictures, captions and crops of a step do not depend on how many
processes share it. Letters: V views, B pictures of a part, U distinct texts, H, W pixels, S the size of the batch.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchrank.data import Dataset
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.curriculum import CURRICULA
from patchrank.pretrain.distributed import World
from patchrank.pretrain.draws import generator, sampler
from patchrank.pretrain.objectives import distinct, positives
from patchrank.pretrain.originals import Originals
from patchrank.pretrain.pictures import Pictures
from patchrank.pretrain.shards import ShardStream
from patchrank.pretrain.view_maker import ViewMaker


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's input, or a part of it."""

    ids: list[str]
    """What the pictures are called, for messages."""
    captions: list[tuple[str, ...]]
    """All captions of each picture."""
    texts: list[str]
    """U distinct captions that were drawn."""
    text_B: Tensor
    """int64: which text was drawn for each picture."""
    count_U: Tensor
    """float32: how many pictures drew each text."""
    positive_BU: Tensor
    """bool: the text is one of the picture's captions."""
    view_VBCHW: Tensor
    """float32 (V, B, 3, H, W), normalised; V = 0 where features are given."""
    box_VB4: Tensor | None = None
    """int64: where each view lies in its picture, in pixels; None: all views show the same."""
    teacher_BCHW: Tensor | None = None
    """float32: what the teacher sees, normalised; None without a teacher."""
    teacher_box_B4: Tensor | None = None
    """int64: where that lies."""
    feature_BD: Tensor | None = None
    """float32: features of a locked image tower, computed before."""

    @property
    def image_BCHW(self) -> Tensor:
        """The first view."""
        return self.view_VBCHW[0]

    @property
    def num_pictures(self) -> int:
        """B."""
        return len(self.captions)


class Batches:
    """Batches of a train split by step.

    Args: source: a data set whose pictures have captions, or a stream of shards; feature_ND: features of all its
    pictures, if the image tower is locked.
    Raises: UserError if the batch is larger than the data, or a picture has no caption.
    """

    def __init__(
        self,
        config: PretrainConfig,
        source: Dataset | ShardStream,
        preprocess: Preprocess,
        world: World | None = None,
        feature_ND: Tensor | None = None,
    ) -> None:
        self.config, self.preprocess, self.world = config, preprocess, world or World()
        self.stream = source if isinstance(source, ShardStream) else None
        self.dataset = None if self.stream else source
        self.num_parts = self.world.size * config.accumulate
        self.feature_ND = feature_ND
        pool = ThreadPoolExecutor(config.workers) if config.workers else None
        self._map = map if pool is None else pool.map
        self.views = ViewMaker(config, preprocess, self._map)
        if self.dataset is not None:
            _check(self.dataset, config)
            self.pictures = Pictures(self.dataset, preprocess)
            self.originals = Originals(self.dataset, 2 * config.image_size)

    @property
    def whole(self) -> bool:
        """Whether all views show the whole picture."""
        return self.views.all_whole

    @property
    def broken(self) -> dict[str, str]:
        """Pictures that could not be used so far, by name: why."""
        if self.stream is not None:
            return self.stream.broken
        images, source = self.dataset.images, self.pictures if self.whole else self.originals
        return {images[number].id: why for number, why in source.broken.items()}

    def at(self, step: int, difficulty: float = 1.0, part: int = 0) -> Batch:
        """One part of a step's batch; `difficulty` 1 takes pictures as they are.

        Broken pictures are left out; where several processes share a batch, others of the part stand in for them, as
        all parts must be equally large.
        """
        config = self.config
        number = self.world.rank * config.accumulate + part
        size = config.batch_size // self.num_parts
        rows = range(number * size, (number + 1) * size)
        if self.feature_ND is not None:
            return self._of_features(step, rows)
        found = self._samples(step, rows, difficulty)
        good = [place for place, sample in enumerate(found) if sample is not None]
        if not good:
            raise UserError(f"--data {config.data}: every picture of a batch is broken; mend the data set")
        if self.world.size > 1:
            good = [place if found[place] is not None else good[place % len(good)] for place in range(size)]
        rows = [rows[place] for place in good]
        ids, pictures, captions = zip(*(found[place] for place in good))
        make = self.views.whole if self.whole else self.views.cropped
        views = make(pictures, rows, step)
        return Batch(ids=list(ids), **self._texts(captions, rows, step), **views)

    def _of_features(self, step: int, rows: Sequence[int]) -> Batch:
        images = self.dataset.images
        numbers = sampler(len(images), self.config.batch_size, self.config.seed, step)[rows.start : rows.stop]
        items = [images[number] for number in numbers.tolist()]
        return Batch(
            ids=[item.id for item in items],
            view_VBCHW=torch.empty(0),
            feature_BD=self.feature_ND[numbers],
            **self._texts([item.captions for item in items], rows, step),
        )

    def _texts(self, captions: Sequence[tuple[str, ...]], rows: Sequence[int], step: int) -> dict:
        """One of each picture's captions, drawn by chance."""
        chance_S = torch.rand(self.config.batch_size, generator=generator(self.config.seed, "caption", step)).tolist()
        drawn = [own[int(chance_S[row] * len(own))] for own, row in zip(captions, rows)]
        texts, count_U = distinct(drawn)
        place = {text: number for number, text in enumerate(texts)}
        text_B = torch.tensor([place[text] for text in drawn])
        return dict(
            captions=list(captions), texts=texts, text_B=text_B, count_U=count_U, positive_BU=positives(captions, texts)
        )

    def _samples(self, step: int, rows: Sequence[int], difficulty: float) -> list[tuple | None]:
        """(id, picture, captions) of each row, or None; the picture as PIL, or as bytes where it is shown whole."""
        config = self.config
        if self.stream is not None:
            own = config.batch_size // self.world.size
            start = step * own + rows.start - self.world.rank * own
            samples = self.stream.take(start, len(rows))
            return [None if one is None else (f"sample {start + n}", *one) for n, one in enumerate(samples)]
        images = self.dataset.images
        numbers = sampler(len(images), config.batch_size, config.seed, step)[rows.start : rows.stop].tolist()
        if difficulty < 1.0:
            return self._easier(numbers, step, rows.start, difficulty)
        if self.whole:
            image_BCHW, good = self.pictures.batch(numbers)
            byte_of = dict(zip(good, image_BCHW))
        else:
            byte_of = dict(zip(numbers, self._map(self.originals.get, numbers)))
        return [
            None if byte_of.get(number) is None else (images[number].id, byte_of[number], images[number].captions)
            for number in numbers
        ]

    def _easier(self, numbers: list[int], step: int, first: int, difficulty: float) -> list[tuple]:
        draw = CURRICULA[self.config.data]
        seed = [self.config.seed, step] if self.num_parts == 1 else [self.config.seed, step, first]
        rng = np.random.default_rng(seed)
        items = [self.dataset.images[number] for number in numbers]
        # some pictures stay easier, so that what was learnt is not lost
        drawn = [draw(item, difficulty * (1 - 0.3 * rng.random()), rng) for item in items]
        return [(item.id, picture, own) for item, (picture, own) in zip(items, drawn)]


def _check(dataset: Dataset, config: PretrainConfig) -> None:
    if config.batch_size > len(dataset.images):
        raise UserError(
            f"--batch-size {config.batch_size}: {dataset.name} has {len(dataset.images)} train pictures; "
            "give a smaller batch"
        )
    if not all(item.captions for item in dataset.images):
        raise UserError(f"--data {dataset.name}: its pictures have no captions; choose a data set with captions")
