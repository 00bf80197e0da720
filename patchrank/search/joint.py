"""Fast search by joint elimination: measure how losing a patch changes the whole feature, then choose who leaves
together so that the changes cancel out.

Exact greedy owes its quality to such cancellations: it takes the patch whose loss mends the damage done so far. The
features of "one patch less" add up well enough to foresee this for a dozen patches at once, so that a few hundred
variants do the work of nineteen thousand.

Letters: N patches, S tested for leaving, T tested for coming back, D feature.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from patchrank.search.criteria import Damage
from patchrank.search.gradient import starts
from patchrank.search.greedy import flipped, hosts_of
from patchrank.search.probes import top_mask
from patchrank.search.ranking import Ranking, ranking_from_order
from patchrank.search.together import improve, in_turn, leave_together, trades
from patchrank.search.variants import Variants
from patchrank.tokens import num_keep, rank

_FIRST, _LAST = 0.715, 0.29
"""Keep ratios between which patches are eliminated; outside, the start's order stands."""
_COVERS, _START_PROBES = 6, 2
_TRADED = 0.05
"""Share of the first patches alive, and as many of the others, that are tested for trading places at the start."""
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


@dataclass
class _Elimination:
    """One image on its way down; remembers how sensitive each patch is."""

    variants: Variants
    damage: Damage
    generator: torch.Generator
    alive_N: Tensor
    squared_N: Tensor

    def _features(self, mask_SN: Tensor) -> Tensor:
        """Features (S, D), in chunks without padding."""
        return torch.cat([self.variants.features(part_SN) for part_SN in mask_SN.split(self.variants.chunk)])

    def _least(self, cost_N: Tensor, num: int) -> Tensor:
        return torch.sort(cost_N, stable=True).indices[:num]

    def trade(self, num: int) -> None:
        """Mend the start: up to `num` patches alive trade places with as many gone ones, if the true damage falls.

        All trades that are foreseen to help are tried, then the better half of them.
        """
        alive_N = self.alive_N
        num = min(num, int(alive_N.sum()), int((~alive_N).sum()))
        gradient_1N, now_1N = self.variants.gradients(alive_N.unsqueeze(0), self.damage, 1, self.generator)
        self.squared_N = _MEMORY * self.squared_N + (1 - _MEMORY) * now_1N[0]
        leave_S = self._least((0.5 * self.squared_N - gradient_1N[0]).masked_fill(~alive_N, torch.inf), num)
        back_T = self._least((0.5 * self.squared_N + gradient_1N[0]).masked_fill(alive_N, torch.inf), num)
        feature_D = self._features(alive_N.unsqueeze(0))[0]
        leave_SD = self._features(flipped(alive_N, leave_S)) - feature_D
        join_TD = self._features(flipped(alive_N, back_T)) - feature_D
        pairs = trades(feature_D, leave_SD, join_TD, self.damage, barred_pairs(self.variants, alive_N, leave_S))
        least = self.damage(feature_D.unsqueeze(0))[0]
        for part in (pairs, pairs[: round(len(pairs) / 2)]):
            mask_N = alive_N.clone()
            mask_N[leave_S[[s for s, _ in part]]] = False
            mask_N[back_T[[t for _, t in part]]] = True
            value = self.damage(self._features(mask_N.unsqueeze(0)))[0]
            if value < least:
                self.alive_N, least = mask_N, value

    def eliminate(self, num_left: int, num_tested: int) -> list[int]:
        """One round: who leaves, first to last. What the sum of changes misses is measured once, and allowed for."""
        num = int(self.alive_N.sum()) - num_left
        feature_D, gradient_N, now_N = self.variants.closing(self.alive_N, self.damage, self.generator)
        self.squared_N = torch.where(self.alive_N, _MEMORY * self.squared_N + (1 - _MEMORY) * now_N, self.squared_N)
        cost_N = (0.5 * self.squared_N - gradient_N).masked_fill(~self.alive_N, torch.inf)
        index_S = self._least(cost_N, min(num + num_left, max(num + 2, num_tested)))
        change_SD = self._features(flipped(self.alive_N, index_S)) - feature_D
        barred_SS = barred_pairs(self.variants, self.alive_N, index_S)
        first = leave_together(feature_D, change_SD, self.damage, num, barred_SS)
        true_D = self._without(index_S[first])
        missed_D = true_D - (feature_D + change_SD[first].sum(0))
        second = improve(feature_D + missed_D, change_SD, self.damage, first, barred_SS)
        # Evaluated even where nothing was exchanged, so that the cost of a search is known before it runs.
        damage_2 = self.damage(torch.stack([true_D, self._without(index_S[second])]))
        best = second if damage_2[1] < damage_2[0] else first
        leaving = index_S[in_turn(feature_D, change_SD, self.damage, best)].tolist()
        self.alive_N[leaving] = False
        return leaving

    def _without(self, leaving_n: Tensor) -> Tensor:
        mask_N = self.alive_N.clone()
        mask_N[leaving_n] = False
        return self._features(mask_N.unsqueeze(0))[0]


def joint(
    variants: Variants, damage: Damage, generator: torch.Generator, *, rounds: int = 8, tested: float = 0.21
) -> Ranking:
    """From the best start at keep 0.715, mended by trades, down to 0.29 in `rounds`: of the patches alive, test those
    that gate gradients call most harmless (`tested` of the first count), and take away those that do least damage
    together.

    The gradients' prediction is second order: minus the gate gradient plus half the squared sensitivity. Constants were
    chosen on train images. Source: ours.
    """
    start_SN, squared_N = starts(variants, damage, generator, _COVERS, _START_PROBES)
    counts = round_counts(variants.num_patches, rounds)
    alive_SN = top_mask(start_SN, counts[0])
    best = damage(variants.features(alive_SN)).argmin()
    order = rank(start_SN[best].unsqueeze(0))[0].tolist()
    walk = _Elimination(variants, damage, generator, alive_SN[best].clone(), squared_N)
    walk.trade(round(_TRADED * counts[0]))
    gone = [index for index in order if not walk.alive_N[index]]
    removed: list[int] = []
    for _, num_left in pairwise(counts):
        removed += walk.eliminate(num_left, round(tested * counts[0]))
    core = [index for index in order if walk.alive_N[index]]
    return ranking_from_order(core + removed[::-1] + gone)
