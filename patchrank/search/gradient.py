"""Fast search by gate gradients: walk in score space, always at real keep sets, judged by the true criterion.

Letters: S candidate scores, N patches.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.search.criteria import Damage
from patchrank.search.medoids import medoid_order
from patchrank.search.probes import covering_scores, judge, metric, normal_scores, top_mask
from patchrank.search.ranking import Ranking, ranking_from_score
from patchrank.search.variants import Variants
from patchrank.tokens import num_keep

_LOW, _HIGH = 0.27, 0.7
"""Keep ratios at which gradients are taken."""
_GOLDEN = 0.6180339887498949
_COVERS = 2
_START_PROBES = 4
_MEMORY = 0.8
_STRIDE, _FALL = 0.4, 0.6
_LINE = (0.05, 0.2)


@dataclass
class _Walker:
    """Directions in score space; remembers how sensitive each patch is."""

    variants: Variants
    damage: Damage
    generator: torch.Generator
    squared_N: Tensor

    def direction(self, score_N: Tensor, step: int) -> Tensor:
        """Unit-variance direction (N,) from one keep set: how much worse off we are without each patch.

        To second order: losing kept patch i costs -gradient + squared / 2, gaining a lost one saves
        -gradient - squared / 2; the curvature keeps sets from flipping back and forth.
        """
        keep = _LOW + (_HIGH - _LOW) * (step * _GOLDEN % 1.0)
        mask_1N = top_mask(score_N.unsqueeze(0), num_keep(keep, self.variants.num_patches))
        gradient_1N, squared_1N = self.variants.gradients(mask_1N, self.damage, 1, self.generator)
        self.squared_N = _MEMORY * self.squared_N + (1 - _MEMORY) * squared_1N[0]
        worth_N = -gradient_1N[0] + 0.5 * self.squared_N * (2.0 * mask_1N[0] - 1.0)
        return worth_N / worth_N.square().mean().sqrt().clamp_min(1e-20)


def starts(
    variants: Variants, damage: Damage, generator: torch.Generator, covers: int, probes: int
) -> tuple[Tensor, Tensor]:
    """Start rankings as scores (S, N), and the squared sensitivity (N,) of every patch at a random covering half.

    Sensitivity-weighted medoids by fold metric and by token, and `covers` >= 1 random coverings.
    """
    cover_SN = covering_scores(variants, covers, generator)
    half_1N = top_mask(cover_SN[:1], num_keep(0.5, variants.num_patches))
    _, squared_1N = variants.gradients(half_1N, damage, probes, generator)
    scores = [cover_SN]
    for metric_NM in (F.normalize(metric(variants)[0], dim=-1), variants.state.patches_BNC[0]):
        for weight_N in (squared_1N[0].sqrt(), squared_1N[0]):
            rank_N = medoid_order(metric_NM, weight_N).argsort()
            scores.append(-rank_N.to(cover_SN.dtype).unsqueeze(0))
    return normal_scores(torch.cat(scores)), squared_1N[0]


def _standardise(score_N: Tensor) -> Tensor:
    return (score_N - score_N.mean(-1, keepdim=True)) / score_N.std(-1, keepdim=True).clamp_min(1e-12)


def gradient(variants: Variants, damage: Damage, generator: torch.Generator, *, steps: int = 22) -> Ranking:
    """The best start, then 6/7 of `steps` free steps with shrinking stride, then line searches from the best so far.

    One step costs a forward and two backward passes over all patches at one keep ratio of 0.27 .. 0.7, and a few
    pruned forwards that judge where it led. Scores are standardised after every step, so they cannot shrink out of
    the selection. Constants were chosen on train images.
    Source: ours; straight-through selection (Bengio et al. 2013) without any relaxed forward.
    """
    start_SN, squared_N = starts(variants, damage, generator, _COVERS, _START_PROBES)
    damage_S = judge(variants, damage, start_SN)
    best_N, least = start_SN[damage_S.argmin()], damage_S.min()
    walker = _Walker(variants, damage, generator, squared_N)
    free = steps * 6 // 7
    score_N = best_N
    for step in range(free):
        stride = _STRIDE * (1 - _FALL * step / max(1, free))
        score_N = _standardise(score_N + stride * walker.direction(score_N, step))
        if step >= free // 3:
            value = judge(variants, damage, score_N.unsqueeze(0))[0]
            if value < least:
                best_N, least = score_N, value
    strides_S1 = torch.tensor(_LINE, device=best_N.device).unsqueeze(1)
    for step in range(free, steps):
        line_SN = _standardise(best_N + strides_S1 * walker.direction(best_N, step))
        damage_S = judge(variants, damage, line_SN)
        if damage_S.min() < least:
            best_N, least = line_SN[damage_S.argmin()], damage_S.min()
    return ranking_from_score(best_N)
