"""What training needs of the frozen tower, once per image and kept in memory: tokens at the cut, dense features.

Letters: n images, P prefix tokens, N patches, C width, D feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from patchrank.data import Dataset, Item, batches
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess
from patchrank.search.runner import spread
from patchrank.tower import VisionTower


@dataclass(frozen=True)
class Tokens:
    """Images as the tower sees them at one layer; rows of all tensors belong together."""

    ids: list[str]
    x_nLC: Tensor
    """Tokens that enter the layer of the first cut, (n, P + N, C)."""
    feature_nD: Tensor
    """Features of the unpruned tower, (n, D)."""
    label_n: Tensor
    """Classes int64, -1 where there is none; for reports only, never for training."""

    def __len__(self) -> int:
        return len(self.ids)


def bytes_per_image(tower: VisionTower) -> int:
    """Memory of one image in the cache, float32."""
    config = tower.config
    return 4 * ((config.num_prefix + config.num_patches) * config.width + config.feature_dim)


@torch.no_grad()
def encode(
    tower: VisionTower,
    dataset: Dataset,
    preprocess: Preprocess,
    layer: int,
    *,
    batch_size: int = 16,
    quiet: bool = True,
) -> Tokens:
    """Run all pictures of a data set once; broken ones are left out.

    Raises: UserError if no picture can be read.
    """
    device = tower.patch.weight.device
    ids, tokens, features, labels = [], [], [], []
    form = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} images, {rate_noinv_fmt}, {remaining} left"
    with tqdm(total=len(dataset.images), unit=" images", bar_format=form, disable=quiet, desc="dense tower") as bar:
        for good, image_BCHW, label_B in batches(dataset, preprocess, batch_size):
            x_BLC = tower.run(tower.embed(image_BCHW.to(device)), 0, layer)
            tokens.append(x_BLC)
            features.append(tower.finish(x_BLC, layer))
            labels.append(label_B)
            ids += good
            bar.update(len(good))
    if not ids:
        raise UserError(f"{dataset.name}: none of its {len(dataset.images)} pictures can be read; check --data-root")
    return Tokens(ids, torch.cat(tokens), torch.cat(features), torch.cat(labels))


def split_items(
    items: Sequence[Item], limit: int | None, held_out: int, ranked: set[str] | None = None
) -> tuple[list[Item], list[Item]]:
    """Images to train on and images to judge by, disjoint, each spread over the classes, the same in every process.

    The held-out images come first in hash order, so they depend neither on `limit` nor on `ranked`, the ids that
    training is limited to (None: all).
    Raises: UserError if nothing is left to train on.
    """
    ordered = spread(items, None)
    rest = [item for item in ordered[held_out:] if ranked is None or item.id in ranked]
    if not rest:
        raise UserError(f"--held-out {held_out}: leaves none of the {len(ordered)} images to train on; lower it")
    return rest[:limit], ordered[:held_out]


def part(dataset: Dataset, items: list[Item]) -> Dataset:
    """The same data set with only these images."""
    return replace(dataset, images=items)


def first(tokens: Tokens, num: int) -> Tokens:
    """The first `num` images."""
    return Tokens(tokens.ids[:num], tokens.x_nLC[:num], tokens.feature_nD[:num], tokens.label_n[:num])
