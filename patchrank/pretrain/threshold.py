"""The threshold of a recipe whose masks keep a share on average: searched for once, before the first step, then fixed.

It is part of the run's settings, so its state and its model say it, and a run that goes on reads it there.
Letters: B pictures, N patches.
"""

from dataclasses import replace
from pathlib import Path

import torch

from patchrank.data import Dataset
from patchrank.preprocess import Preprocess
from patchrank.pretrain.batches import Batch, Batches
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.distributed import World, sum_over_ranks
from patchrank.pretrain.draws import generator
from patchrank.pretrain.maskers import MASKERS, MaskContext, mask
from patchrank.pretrain.masking.keep_set import search_threshold
from patchrank.pretrain.shards import ShardStream
from patchrank.pretrain.state import read_settings

NUM_BATCHES = 4
"""The first batches of the run, at full difficulty."""


def is_open(config: PretrainConfig) -> bool:
    """Whether a mask of the recipe waits for its threshold."""
    return any(view.mask.mean_keep is not None for view in config.row.views)


def with_threshold(
    config: PretrainConfig, source: Dataset | ShardStream, state: Path, world: World, device: str
) -> PretrainConfig:
    """The config with its recipe's threshold, from the `state` of the run if there is one, else searched for.

    The process that leads searches and tells the others. A recipe without such a mask, or a threshold that is given,
    leaves the config as it is. Raises: UserError for a state that cannot be read.
    """
    if not is_open(config):
        return config
    known = read_settings(state).get("threshold") if state.exists() else None
    if known is None:
        own = _search(config, source, config.preprocess()) if world.leads else 0.0
        known = sum_over_ranks(own, device)
    return replace(config, threshold=known)


def _search(config: PretrainConfig, source: Dataset | ShardStream, preprocess: Preprocess) -> float:
    """Cosine above which so many patches fall that the rest is `mean_keep` on average; on the CPU, without the tower.

    Source: E-CLIP (Wei et al. 2024), the search that its code documents (and never calls). As there, the bounds of a
    picture's count (`least`, `keep`) do not take part: they make the mean that enters the tower somewhat smaller.
    """
    batches = Batches(replace(config, accumulate=1, workers=0), source, preprocess)
    number, view = next((n, view) for n, view in enumerate(config.row.views) if view.mask.mean_keep is not None)
    found = []
    for step in range(NUM_BATCHES):
        context = _context(config, batches.at(step), number, generator(config.seed, "threshold", step))
        found.append(MASKERS[view.mask.masker](context))
    return -search_threshold(torch.cat(found), view.mask.mean_keep).item()


def kept_share(config: PretrainConfig, batch: Batch) -> float:
    """Share of the patches that the thresholded masks of a config (whose threshold is known) leave of a batch."""
    num_kept = num_patches = 0
    for number, view in enumerate(config.row.views):
        if view.mask.least is not None:
            context = _context(config, batch, number, generator(config.seed, "threshold", NUM_BATCHES))
            num_kept += int(mask(view.mask, context).valid_BK.sum())
            num_patches += context.num_patches * batch.num_pictures
    return num_kept / num_patches


def as_line(config: PretrainConfig, batch: Batch) -> str:
    """What the threshold of a config does, with the share that it leaves of a batch."""
    views = replace(config, threshold=None).row.views
    row = next(view.mask for view in views if view.mask.mean_keep is not None)
    return (
        f"threshold {config.threshold:.4f}: patches that are more alike to an anchor fall; meant to keep "
        f"{100 * row.mean_keep:.0f} % on average, at most {100 * row.keep:.0f} % of a picture; of this batch it keeps "
        f"{100 * kept_share(config, batch):.1f} %"
    )


def _context(config: PretrainConfig, batch: Batch, view: int, chance: torch.Generator) -> MaskContext:
    """What a masker that needs only pictures is told."""
    return MaskContext(image_BCHW=batch.view_VBCHW[view], patch_size=config.patch_size, generator=chance)
