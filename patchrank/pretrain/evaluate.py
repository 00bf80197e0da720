"""Checks of the pair in training, with the class matrix and the metrics that users get: zero-shot and retrieval.

Letters: B pictures of a batch, D feature, Y classes, Q queries, G gallery.
"""

import logging
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.checkpoints.loaded import LoadedClip
from patchrank.errors import UserError
from patchrank.loading import class_matrix
from patchrank.metrics import accuracy, mean_per_class, recall_at_k
from patchrank.preprocess import Preprocess
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.model import Pair
from patchrank.pretrain.pairs import CAPTION_FOLDER, SHARDS, load_part, parts_of
from patchrank.pretrain.pictures import Pictures, normalise
from patchrank.text_encoders import OwnText

logger = logging.getLogger(__name__)

RECALL_AT = (1, 5, 10)
PER_CLASS = "mean_per_class_recall"
Look = Callable[[Pictures], tuple[Tensor, list[int]]]
"""Unit features (n, D) float32 of all pictures that can be opened, and their indices."""


def open_checks(config: PretrainConfig, split: str, preprocess: Preprocess) -> list[Pictures]:
    """Data sets to check on: those of --eval-data, or of --data.

    Where --data-root is a folder of shards or your own, other sets lie where the catalog looks for them. A set that
    lacks the split, or has neither classes nor captions, is left out and logged.
    """
    found, own = [], config.data in (SHARDS, CAPTION_FOLDER)
    for name in parts_of(config.eval_data or config.data, "--eval-data" if config.eval_data else "--data"):
        if name == SHARDS:
            continue
        try:
            root = None if own and name != CAPTION_FOLDER else config.data_root
            dataset = load_part(name, root, split)
        except UserError as error:
            logger.warning("no check on %s: %s", name, error)
            continue
        if dataset.class_names or any(item.captions for item in dataset.images):
            found.append(Pictures(dataset, preprocess))
    return found


def check_pair(
    pair: Pair, checks: list[Pictures], preprocess: Preprocess, batch_size: int, look: Look | None = None
) -> dict[str, float]:
    """Every metric by name, fractions in [0, 1]: "<data set> accuracy", "<data set> t2i@5" and the like.

    Where a data set has classes, accuracy, and "mean_per_class_recall" if these are not equally large; else recall both
    ways. Every patch is seen; broken pictures do not count.
    Args: look, where features come from if not from the pair's own image tower now.
    """
    pair.eval()
    look = look or partial(image_features, pair, preprocess=preprocess, batch_size=batch_size)
    found: dict[str, float] = {}
    for pictures in checks:
        name = pictures.dataset.name
        if pictures.dataset.class_names:
            own = zero_shot(pair, pictures, preprocess, look)
        else:
            own = retrieval(pair, pictures, look)
        found |= {f"{name} {metric}": value for metric, value in own.items()}
    pair.train()
    return found


def _text_encoder(pair: Pair) -> OwnText:
    return OwnText(deepcopy(pair.text), pair.log_scale.exp().item())


@torch.no_grad()
def image_features(pair: Pair, pictures: Pictures, preprocess: Preprocess, batch_size: int) -> tuple[Tensor, list[int]]:
    """Unit features (n, D) float32 of all pictures that can be opened, and their indices."""
    device, features, good = pair.log_scale.device, [], []
    for start in range(0, len(pictures.dataset.images), batch_size):
        image_BCHW, numbers = pictures.batch(range(start, min(start + batch_size, len(pictures.dataset.images))))
        if numbers:
            features.append(F.normalize(pair.tower(normalise(image_BCHW, preprocess).to(device)), dim=-1))
            good += numbers
    return torch.cat(features) if features else torch.empty(0, pair.text.config.output_dim, device=device), good


@torch.no_grad()
def zero_shot(pair: Pair, pictures: Pictures, preprocess: Preprocess, look: Look) -> dict[str, float]:
    """Accuracy in [0, 1] of labelled pictures by their nearest class prompt, and its mean over classes of unequal size.

    Empty if no picture has a label.
    """
    clip = LoadedClip(
        tower=pair.tower,
        preprocess=preprocess,
        model_name="in training",
        pretrained="",
        weights_hash="",
        text=_text_encoder(pair),
    )
    feature_nD, numbers = look(pictures)
    weight_DY = class_matrix(clip, pictures.dataset)[0].to(feature_nD.device)
    labels = [pictures.dataset.images[number].label for number in numbers]
    places = [place for place, label in enumerate(labels) if label is not None]
    if not places:
        return {}
    label_n, logit_nY = torch.tensor([labels[place] for place in places]), (feature_nD[places] @ weight_DY).cpu()
    found = {"accuracy": accuracy(logit_nY, label_n)}
    if len(set(Counter(label_n.tolist()).values())) > 1:
        found[PER_CLASS] = mean_per_class(logit_nY.argmax(1), label_n)
    return found


def num_tested(pictures: Pictures) -> dict[str, float]:
    """Pictures of a data set by its name, and how many of equally large classes would scatter like the mean per class.

    That is Y^2 / sum(1 / n) for Y classes of n pictures, if all are equally hard.
    """
    dataset = pictures.dataset
    found = {dataset.name: len(dataset.images)}
    sizes = Counter(item.label for item in dataset.images if item.label is not None).values()
    if len(set(sizes)) > 1:
        found[f"{dataset.name} {PER_CLASS}"] = len(sizes) ** 2 / sum(1 / size for size in sizes)
    return found


@torch.no_grad()
def retrieval(pair: Pair, pictures: Pictures, look: Look) -> dict[str, float]:
    """Recall in [0, 1] at 1, 5, 10 from text to image ("t2i@1") and from image to text; all captions take part."""
    feature_nD, numbers = look(pictures)
    images = pictures.dataset.images
    if not numbers:
        return {}
    owner, texts = zip(*((place, text) for place, number in enumerate(numbers) for text in images[number].captions))
    text_QD = _text_encoder(pair)(list(texts))
    match_QG = (torch.tensor(owner)[:, None] == torch.arange(len(numbers))).to(feature_nD.device)
    similarity_QG = text_QD @ feature_nD.T
    recalls = {}
    for k in RECALL_AT:
        if k <= min(similarity_QG.shape):
            recalls[f"t2i@{k}"] = recall_at_k(similarity_QG, match_QG, k)
            recalls[f"i2t@{k}"] = recall_at_k(similarity_QG.T, match_QG.T, k)
    return recalls
