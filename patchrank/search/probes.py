"""What the fast strategies share: masks from scores, judged by the true criterion at a few keep ratios.

Letters: S candidate scores, V variants, N patches.
"""

import torch
from torch import Tensor

from patchrank.pruned import fold_metric
from patchrank.search.criteria import Damage
from patchrank.search.variants import Variants
from patchrank.tokens import num_keep, rank, suppress

PROBES = (0.3, 0.42, 0.6)
"""Keep ratios at which a ranking is judged, denser at the hard end of 0.3 .. 0.7 (chosen on train images)."""


def top_mask(score_SN: Tensor, K: int) -> Tensor:
    """Keep masks (S, N) bool of the K highest scores."""
    return torch.zeros_like(score_SN, dtype=torch.bool).scatter_(1, rank(score_SN)[:, :K], True)


def judge(variants: Variants, damage: Damage, score_SN: Tensor) -> Tensor:
    """True damage (S,) of rankings given as scores (S, N), mean over `PROBES`."""
    masks = [top_mask(score_SN, num_keep(keep, variants.num_patches)) for keep in PROBES]
    return torch.stack([damage(variants.features(mask_SN)) for mask_SN in masks]).mean(0)


def normal_scores(score_SN: Tensor) -> Tensor:
    """Scores replaced by the normal quantiles of their ranks: mean 0, variance about 1, same order."""
    rank_SN = score_SN.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).double()
    return torch.special.ndtri((rank_SN + 0.5) / score_SN.shape[-1]).float()


def covering_scores(variants: Variants, num: int, generator: torch.Generator) -> Tensor:
    """Scores (num, N) of random covering selections: random priorities, then `suppress` on the fold metric."""
    device = variants.state.x_BLC.device
    priority_SN = torch.rand(num, variants.num_patches, generator=generator).to(device)
    return suppress(priority_SN, metric(variants).expand(num, -1, -1))


def metric(variants: Variants) -> Tensor:
    """The fold metric (1, N, M); under drop it is computed here and counted."""
    if variants.metric_1NM is not None:
        return variants.metric_1NM
    variants.macs += variants.state.x_BLC.shape[1] * variants.tower.config.width**2
    return fold_metric(variants.state)
