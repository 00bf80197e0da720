"""Fast search by joint elimination: measure how losing a patch changes the whole feature, then choose who leaves
together so that the changes cancel out.

Exact greedy owes its quality to such cancellations: it takes the patch whose loss mends the damage done so far. The
features of "one patch less" add up well enough to foresee this for a dozen patches at once, so that a few hundred
variants do the work of nineteen thousand.

Letters: N patches, S tested.
"""

from itertools import pairwise

import torch
from torch import Tensor

from patchrank.search.criteria import Damage
from patchrank.search.gradient import starts
from patchrank.search.greedy import hosts_of
from patchrank.search.probes import top_mask
from patchrank.search.ranking import Ranking, ranking_from_order
from patchrank.search.together import leave_together
from patchrank.search.variants import Variants
from patchrank.tokens import num_keep, rank

_FIRST, _LAST = 0.715, 0.29
"""Keep ratios between which patches are eliminated; outside, the start's order stands."""
_COVERS = 6
_MEMORY = 0.5


def round_counts(num_patches: int, rounds: int) -> list[int]:
    """Patches alive before the first round and after each: a falling geometric row, `rounds` + 1 numbers or fewer."""
    first, last = (num_keep(keep, num_patches) for keep in (_FIRST, _LAST))
    counts = {round(first * (last / first) ** (step / rounds)) for step in range(rounds + 1)}
    return sorted(counts, reverse=True)


def barred_pairs(variants: Variants, alive_N: Tensor, index_S: Tensor) -> Tensor:
    """Pairs (S, S) of a patch and its host under fold: each alone looks harmless because the other stays."""
    if variants.metric_1NM is None:
        return torch.zeros(len(index_S), len(index_S), dtype=torch.bool, device=index_S.device)
    is_host_SS = hosts_of(variants.metric_1NM[0], alive_N)[index_S].unsqueeze(1) == index_S
    return is_host_SS | is_host_SS.mT


def joint(
    variants: Variants, damage: Damage, generator: torch.Generator, *, rounds: int = 8, tested: float = 0.24
) -> Ranking:
    """From the best start at keep 0.715 down to 0.29 in `rounds`: test the `tested` share of the patches alive that
    gate gradients call most harmless, and take away those that do least damage together.

    The gradients' prediction is second order: minus the gate gradient plus half the squared sensitivity. Constants were
    chosen on train images. Source: ours.
    """
    start_SN, squared_N = starts(variants, damage, generator, _COVERS)
    counts = round_counts(variants.num_patches, rounds)
    alive_SN = top_mask(start_SN, counts[0])
    best = damage(variants.features(alive_SN)).argmin()
    order, alive_N = rank(start_SN[best].unsqueeze(0))[0].tolist(), alive_SN[best].clone()
    removed: list[int] = []
    for _, num_left in pairwise(counts):
        num = int(alive_N.sum()) - num_left
        feature_D, gradient_N, now_N = variants.closing(alive_N, damage, generator)
        squared_N = torch.where(alive_N, _MEMORY * squared_N + (1 - _MEMORY) * now_N, squared_N)
        cost_N = (0.5 * squared_N - gradient_N).masked_fill(~alive_N, torch.inf)
        num_tested = min(num + num_left, max(num + 2, round(tested * (num + num_left))))
        index_S = torch.sort(cost_N, stable=True).indices[:num_tested]
        mask_SN = alive_N.repeat(num_tested, 1)
        mask_SN[torch.arange(num_tested, device=alive_N.device), index_S] = False
        change_SD = variants.features(mask_SN) - feature_D
        together = leave_together(feature_D, change_SD, damage, num, barred_pairs(variants, alive_N, index_S))
        leaving = index_S[together].tolist()
        alive_N[leaving] = False
        removed += leaving
    core = [index for index in order if alive_N[index]]
    return ranking_from_order(core + removed[::-1] + order[counts[0] :])
