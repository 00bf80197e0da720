"""Fast search without gradients: the best of random covering priorities, then rounds of mutation.

Letters: S candidates, N patches.
"""

import torch
from torch import Tensor

from patchrank.search.criteria import Damage
from patchrank.search.probes import judge, metric, normal_scores
from patchrank.search.ranking import Ranking, ranking_from_score
from patchrank.search.variants import Variants
from patchrank.tokens import suppress

_CHILDREN = 16
_SHARE = 0.25


def _mutate(priority_N: Tensor, num: int, width: float, generator: torch.Generator) -> Tensor:
    """Children (num, N): normal noise of deviation `width` on a random quarter of the priorities."""
    shape = (num, priority_N.shape[0])
    noise_SN = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < _SHARE)
    return priority_N + width * noise_SN.to(priority_N.device)


def evolve(
    variants: Variants, damage: Damage, generator: torch.Generator, *, randoms: int = 32, rounds: int = 4
) -> Ranking:
    """Best of `randoms` covering rankings, then `rounds` of 16 mutated children each, the best surviving.

    Priorities are mutated, `suppress` turns them into covering scores, the true criterion judges at three keep ratios.
    Source: ours (docs/design.md); an evolution strategy of the (1 + 16) kind.
    """
    metric_1NM = metric(variants)
    priority_SN = normal_scores(torch.rand(randoms, variants.num_patches, generator=generator))
    priority_SN = priority_SN.to(metric_1NM.device)

    def best_of(priority_SN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score_SN = suppress(priority_SN, metric_1NM.expand(len(priority_SN), -1, -1))
        damage_S = judge(variants, damage, score_SN)
        index = damage_S.argmin()
        return priority_SN[index], score_SN[index], damage_S[index]

    parent_N, score_N, least = best_of(priority_SN)
    for number in range(rounds):
        child_N, child_score_N, value = best_of(_mutate(parent_N, _CHILDREN, 1.0 / (1 + number), generator))
        if value < least:
            parent_N, score_N, least = child_N, child_score_N, value
    return ranking_from_score(normal_scores(score_N.unsqueeze(0))[0])
