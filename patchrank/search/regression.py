"""Fast search by regression: evaluate random keep sets at the keep ratio in use, fit one additive effect per patch.

Letters: V variants, N patches.
"""

import torch
from torch import Tensor

from patchrank.search.criteria import Damage
from patchrank.search.ranking import Ranking, ranking_from_score
from patchrank.search.variants import Variants
from patchrank.tokens import num_keep


def random_masks(num: int, num_patches: int, K: int, generator: torch.Generator) -> Tensor:
    """`num` keep masks (num, N) bool of K patches each, drawn in complementary pairs where K allows."""
    order_VN = torch.rand(num, num_patches, generator=generator).argsort(dim=1)
    order_VN[1::2] = order_VN[: num - num % 2 : 2].flip(1)
    return torch.zeros(num, num_patches, dtype=torch.bool).scatter_(1, order_VN[:, :K], True)


def ridge(mask_VN: Tensor, damage_V: Tensor) -> Tensor:
    """Damage that each patch's absence adds, (N,): ridge regression, strength by generalised cross-validation.

    Source: Petsiuk et al. 2018 (RISE) and Lundberg & Lee 2017 (KernelSHAP) fit masks alike, at other mask ratios.
    """
    absent_VN = (~mask_VN).double()
    absent_VN = absent_VN - absent_VN.mean(0)
    target_V = damage_V.double() - damage_V.double().mean()
    U, singular, Vh = torch.linalg.svd(absent_VN, full_matrices=False)
    projected = U.mT @ target_V
    best_effect, least = None, float("inf")
    for strength in torch.logspace(-2, 3, 26, dtype=torch.float64):
        shrink = singular.square() / (singular.square() + strength)
        residual = target_V - U @ (shrink * projected)
        freedom = (1 - shrink.sum() / len(target_V)).clamp_min(1e-6)
        error = (residual.square().mean() / freedom.square()).item()
        if error < least:
            best_effect, least = Vh.mT @ (shrink / singular.clamp_min(1e-9) * projected), error
    return best_effect.float()


def regression(
    variants: Variants, damage: Damage, generator: torch.Generator, *, masks: int = 256, target: float = 0.5
) -> Ranking:
    """Rank by the additive effects of `masks` random keep sets at keep ratio `target`."""
    K = num_keep(target, variants.num_patches)
    mask_VN = random_masks(masks, variants.num_patches, K, generator).to(variants.state.x_BLC.device)
    return ranking_from_score(ridge(mask_VN, damage(variants.features(mask_VN))))
