"""What a loaded data set is, and how its pictures become batches.

Ids are paths relative to the data set's root; a picture that cannot be decoded is skipped and listed, and keeps its
place, so that every other picture keeps its label and its batch. Letters: B batch, C channel, H rows, W columns.
"""

import io
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from patchrank.data.prompts import PHOTO, imagenet_ensemble
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess

logger = logging.getLogger(__name__)


class BrokenImage(Exception):
    """A picture that is there but cannot be read or decoded."""


@dataclass(frozen=True, slots=True)
class Item:
    """One picture: its id, its class (None where there are no classes) and its captions (often none)."""

    id: str
    label: int | None = None
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One split of one data set, in the order of its split file."""

    name: str
    split: str
    images: list[Item]
    class_names: list[str] = field(default_factory=list)
    """Readable, in label order; empty for caption and flat folders."""
    templates: tuple[str, ...] = (PHOTO,)
    """Prompts with one {} for the class name: the single one of CoOp."""
    ensemble: tuple[str, ...] = ()
    """OpenAI's prompts for this data set; empty stands for the 80 of ImageNet."""
    root: Path | None = None
    """Folder or tar that was read; None where pictures are drawn."""
    split_source: str = ""
    """File or folder that defined the split."""
    missing: list[str] = field(default_factory=list)
    """Ids that the split file lists but the disk lacks; they are not in `images`."""
    read: Callable[[str], bytes | Image.Image]
    """Id -> encoded bytes, or a drawn picture."""

    def open(self, id: str) -> Image.Image:
        """RGB picture of one id. Raises: BrokenImage with id and reason."""
        try:
            data = self.read(id)
        except OSError as error:
            raise BrokenImage(f"{id}: {error}") from error
        if isinstance(data, Image.Image):
            return data.convert("RGB")
        try:
            return Image.open(io.BytesIO(data)).convert("RGB")
        except Exception as error:  # decoders answer damaged bytes with almost any exception
            raise BrokenImage(f"{id}: {type(error).__name__}: {error}") from error

    def with_ensemble(self) -> "Dataset":
        """The same data set with OpenAI's prompt ensemble as its templates."""
        return replace(self, templates=self.ensemble or imagenet_ensemble())


def batches(
    dataset: Dataset,
    preprocess: Preprocess,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    broken: list[str] | None = None,
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Pictures start .. stop-1 as (ids, image_BCHW float32, label_B int64; -1 where there is no label).

    Windows of `batch_size` places: a broken picture makes its batch smaller and moves no other; its id is appended
    to `broken`. A window without any good picture gives no batch.

    Raises: UserError for a batch size below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: at least 1; give a positive number")
    items = dataset.images[start:stop]
    for first in range(0, len(items), batch_size):
        good, pictures = [], []
        for item in items[first : first + batch_size]:
            try:
                pictures.append(preprocess(dataset.open(item.id)))
                good.append(item)
            except BrokenImage as error:
                logger.warning("broken image skipped: %s", error)
                if broken is not None:
                    broken.append(item.id)
        if good:
            labels = [-1 if item.label is None else item.label for item in good]
            yield [item.id for item in good], torch.stack(pictures), torch.tensor(labels, dtype=torch.int64)


def few_shot(dataset: Dataset, shots: int, seed: int) -> Dataset:
    """`shots` pictures of each class, drawn as CoOp draws them; a class with fewer gives all it has.

    Source: CoOp / Dassl `generate_fewshot_dataset`: Python's `random` seeded once, classes in the order in which they
    first appear in the train split, `sample` within each. The pictures equal CoOp's for the same split file and seed
    where nothing is missing (its ImageNet order is that of the file system, hence not defined). CoOp's few-shot val
    split is not drawn here.

    Raises: UserError for shots below 1 or pictures without labels.
    """
    if shots < 1:
        raise UserError(f"shots {shots}: at least 1 picture a class; give a positive number")
    by_label: dict[int, list[Item]] = {}
    for item in dataset.images:
        if item.label is None:
            raise UserError(f"{dataset.name}: few-shot needs class labels; choose a data set with classes")
        by_label.setdefault(item.label, []).append(item)
    if dataset.missing:
        logger.warning(
            "%s: %d pictures are missing, so the draw differs from CoOp's", dataset.name, len(dataset.missing)
        )
    draw = random.Random(seed)
    chosen = [draw.sample(items, shots) if len(items) >= shots else items for items in by_label.values()]
    return replace(dataset, images=[item for items in chosen for item in items])
