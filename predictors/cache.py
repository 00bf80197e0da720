"""What training needs of the frozen tower, once per image, in memory and if wanted on disk: tokens, dense features.

Letters: n images, P prefix tokens, N patches, C width, D feature.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from patchrank.atomic import write_tensors
from patchrank.checkpoints.weights import weights_hash
from patchrank.data import Dataset, Item, batches
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess
from patchrank.pretrain.distributed import ALONE, World, barrier, joined_list, joined_rows
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


def kept_tokens(
    folder: Path | None,
    tower: VisionTower,
    dataset: Dataset,
    preprocess: Preprocess,
    layer: int,
    *,
    quiet: bool = True,
    world: World = ALONE,
) -> Tokens:
    """`encode`, or what an earlier call with equal weights, images, transform and layer left in `folder`.

    Several processes encode a share each and all get the whole.
    Raises: UserError as `encode`, and for a file that cannot be read.
    """
    if folder is None:
        return _encode_together(tower, dataset, preprocess, layer, quiet, world)
    asked = [weights_hash(tower), layer, preprocess.to_dict(), dataset.name, [item.id for item in dataset.images]]
    path = folder / f"tokens_{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.safetensors"
    absent = not path.is_file()
    barrier()  # all look before one writes
    if absent:
        tokens = _encode_together(tower, dataset, preprocess, layer, quiet, world)
        if world.leads:
            values = {"x": tokens.x_nLC, "feature": tokens.feature_nD, "label": tokens.label_n}
            write_tensors(path, values, {"ids": json.dumps(tokens.ids)})
        return tokens
    try:
        with safe_open(str(path), "pt", device=str(tower.patch.weight.device)) as file:
            ids = json.loads(file.metadata()["ids"])
            return Tokens(ids, *(file.get_tensor(name) for name in ("x", "feature", "label")))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, and it is made again") from error


def _encode_together(
    tower: VisionTower, dataset: Dataset, preprocess: Preprocess, layer: int, quiet: bool, world: World
) -> Tokens:
    num = len(dataset.images)
    if num < world.size:
        return encode(tower, dataset, preprocess, layer, quiet=quiet)
    own = dataset.images[num * world.rank // world.size : num * (world.rank + 1) // world.size]
    tokens = encode(tower, part(dataset, own), preprocess, layer, quiet=quiet)
    rows = (joined_rows(value) for value in (tokens.x_nLC, tokens.feature_nD, tokens.label_n.to(tokens.x_nLC.device)))
    x_nLC, feature_nD, label_n = rows
    return Tokens(joined_list(tokens.ids), x_nLC, feature_nD, label_n.to(tokens.label_n.device))


def even(items: Sequence[Item]) -> list[Item]:
    """Items in hash order, the first of every class before the second of any, and so on."""
    seen: Counter = Counter()
    turn = {}
    for item in (ordered := spread(items, None)):
        turn[item.id] = seen[item.label]
        seen[item.label] += item.label is not None
    return sorted(ordered, key=lambda item: turn[item.id])


def split_items(
    items: Sequence[Item], limit: int | None, held_out: int, ranked: set[str] | None = None
) -> tuple[list[Item], list[Item]]:
    """Images to train on and images to judge by, disjoint, as many of each class as can be, the same in every process.

    The held-out images come first, so they depend neither on `limit` nor on `ranked`, the ids that training is
    limited to (None: all).
    Raises: UserError if nothing is left to train on.
    """
    ordered = even(items)
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
