"""Backward elimination: take away the patch whose loss hurts least, look again, and so on (the paper's "greedy").

Letters: N patches, A patches still alive, V variants.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.search.criteria import Damage
from patchrank.search.ranking import Ranking, ranking_from_removal
from patchrank.search.variants import Variants

_ROUNDING = 4e-6


def removals(alive_N: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (A,) of the patches alive and the masks (A, N) that lack one of them each."""
    index_A = alive_N.nonzero().squeeze(1)
    return index_A, flipped(alive_N, index_A)


def flipped(alive_N: Tensor, index_S: Tensor) -> Tensor:
    """Masks (S, N) in each of which one of the patches (S,) has left, or is back if it was gone."""
    mask_SN = alive_N.repeat(len(index_S), 1)
    mask_SN[torch.arange(len(index_S), device=alive_N.device), index_S] ^= True
    return mask_SN


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


def hosts_of(metric_NM: Tensor, alive_N: Tensor) -> Tensor:
    """Nearest other patch alive (N,) int64 of every patch by cosine: where its content goes when it is folded."""
    unit_NM = F.normalize(metric_NM, dim=-1)
    cosine_NN = (unit_NM @ unit_NM.mT).fill_diagonal_(-2.0)
    return cosine_NN.masked_fill(~alive_N, -2.0).argmax(dim=-1)


def apart(index_A: Tensor, host_N: Tensor, num: int) -> list[int]:
    """The first `num` of patches (A,) that do not lose their host in the same round; fewer if there are not so many."""
    taken: list[int] = []
    for index in index_A.tolist():
        if len(taken) == num:
            break
        if int(host_N[index]) not in taken:
            taken.append(index)
    return taken


def greedy(variants: Variants, damage: Damage, *, step: int = 1, decay: bool = False) -> Ranking:
    """Exact backward elimination for `step=1`; several patches a round otherwise (their interaction is ignored).

    Under fold a patch and its host never leave in the same round: each alone looks harmless because the other stays.
    Ties fall to the lowest index. Source: Patch Ranking, abstract ("greedy search"); section 3.1 describes one sweep.
    """
    num_patches = variants.num_patches
    alive_N = torch.ones(num_patches, dtype=torch.bool, device=variants.state.x_BLC.device)
    removed, values = [], []
    while (num_alive := num_patches - len(removed)) > 1:
        index_A, mask_AN = removals(alive_N)
        damage_A = damage(variants.features(mask_AN))
        num = step_size(num_alive, num_patches, step, decay)
        if num > 1 and variants.metric_1NM is not None:
            by_damage_A = index_A[torch.sort(damage_A, stable=True).indices]
            leaving = apart(by_damage_A, hosts_of(variants.metric_1NM[0], alive_N), num)
        else:
            leaving = index_A[least_harmful(damage_A, num)].tolist()
        value_of = dict(zip(index_A.tolist(), damage_A.tolist(), strict=True))
        alive_N[leaving] = False
        removed += leaving
        values += [value_of[index] for index in leaving]
    return ranking_from_removal(removed, values, num_patches)
