"""Backward elimination: take away the patch whose loss hurts least, look again, and so on (the paper's "greedy").

Letters: N patches, A patches still alive, V variants.
"""

import torch
from torch import Tensor

from patchrank.search.criteria import Damage
from patchrank.search.ranking import Ranking, ranking_from_removal
from patchrank.search.variants import Variants

_ROUNDING = 4e-6


def removals(alive_N: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (A,) of the patches alive and the masks (A, N) that lack one of them each."""
    index_A = alive_N.nonzero().squeeze(1)
    mask_AN = alive_N.repeat(len(index_A), 1)
    mask_AN[torch.arange(len(index_A), device=alive_N.device), index_A] = False
    return index_A, mask_AN


def step_size(num_alive: int, num_patches: int, step: int, decay: bool) -> int:
    """Patches to take away next: `step`, or under `decay` the same share of the survivors, never below one."""
    share = round(step * num_alive / num_patches) if decay else step
    return max(1, min(share, num_alive - 1))


def least_harmful(damage_A: Tensor, num: int) -> Tensor:
    """Indices (num,) of the smallest damages, ties to the lowest index; for one index, ties within rounding as well.

    Under fold, removing either of two patches that are each other's nearest gives the same tokens, so true ties are
    common there; without a tolerance the last bit of float32 would decide them. A damage is half a squared distance d
    of unit vectors, so an error of `_ROUNDING` in d is an error of d * _ROUNDING in the damage.
    """
    if num > 1:
        return torch.sort(damage_A, stable=True).indices[:num]
    least = damage_A.min()
    return (damage_A <= least + _ROUNDING * least.clamp_min(0).sqrt()).nonzero()[0]


def greedy(variants: Variants, damage: Damage, *, step: int = 1, decay: bool = False) -> Ranking:
    """Exact backward elimination for `step=1`; several patches a round otherwise (their interaction is ignored).

    Ties fall to the lowest index. Source: Patch Ranking, abstract ("greedy search"); section 3.1 describes one sweep.
    """
    num_patches = variants.num_patches
    alive_N = torch.ones(num_patches, dtype=torch.bool, device=variants.state.x_BLC.device)
    removed, values = [], []
    while (num_alive := num_patches - len(removed)) > 1:
        index_A, mask_AN = removals(alive_N)
        damage_A = damage(variants.features(mask_AN))
        least = least_harmful(damage_A, step_size(num_alive, num_patches, step, decay))
        alive_N[index_A[least]] = False
        removed += index_A[least].tolist()
        values += damage_A[least].tolist()
    return ranking_from_removal(removed, values, num_patches)
