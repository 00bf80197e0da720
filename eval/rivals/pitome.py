"""PiToMe: merging by energy, so that tokens in large groups of similar ones merge and lonely ones stay; training-free.

Source: Tran et al. 2024, "Accelerating Transformers with Spectrum-Preserving Token Merging", section 3.2: a token's
energy is its mean over all tokens of f(cos) with f(c) = c where c is at least the margin, else exp(c - margin) - 1; the
margin falls with the depth, 0.9 - 0.9 l / L. The 2k tokens of highest energy are split alternately in order of energy
into A and B, each of A joins its most similar of B, a mean weighted with sizes; attention is biased by log size. The
same ratio of tokens stays in every block.
Deviation: cosines are of the mean of the keys over heads, as in ToMe, prefix tokens apart.

Letters: B batch, N patches present, K pairs merged, C width, M metric channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.rivals.budget import nearest_setting
from eval.rivals.tome import average_into
from eval.rivals.walk import Step, Walk, blocks_between
from patchrank.tokens import gather_tokens, num_keep, rank
from patchrank.tower import TowerConfig, VisionTower

_STEPS = 10_000
"""Resolution of the ratio that every block keeps."""


def energy(cosine_BNN: Tensor, margin: float) -> Tensor:
    """Energy (B, N): high for a token of a large group."""
    return torch.where(cosine_BNN >= margin, cosine_BNN, (cosine_BNN - margin).exp() - 1).mean(-1)


def pairs(cosine_BNN: Tensor, K: int, margin: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which patches merge: a (B, K) into b (B, K) at `host` (B, K), and the protected (B, N - 2K); indices int64."""
    order_BN = rank(energy(cosine_BNN, margin))
    a_BK, b_BK, protected = order_BN[:, : 2 * K : 2], order_BN[:, 1 : 2 * K : 2], order_BN[:, 2 * K :]
    row_BKN = gather_tokens(cosine_BNN, a_BK)
    host_BK = row_BKN.gather(2, b_BK.unsqueeze(1).expand(-1, K, -1)).argmax(-1)
    return a_BK, b_BK, host_BK, protected


def left_after(config: TowerConfig, share: float, first: int = 0, last: int = 11) -> dict[int, int]:
    """{layer: patches behind it} if blocks `first` .. `last` of 12 keep `share`, at least half; idle ones left out."""
    left, found = config.num_patches, {}
    for place, layer in enumerate(blocks_between(config, first, last), start=1):
        target = max(num_keep(share**place, config.num_patches), left - left // 2)
        if target < left:
            found[layer] = left = target
    return found


def energy_macs(config: TowerConfig, left: dict[int, int]) -> dict[int, int]:
    """{layer: MACs}: cosines of all pairs of patches that come to the block."""
    before = [config.num_patches, *left.values()]
    return {layer: num**2 * (config.width // config.num_heads) for layer, num in zip(left, before)}


class PiToMe(Walk):
    """A tower that merges down to `left[layer]` patches in each block of `left`."""

    def __init__(self, tower: VisionTower, left: dict[int, int]) -> None:
        super().__init__(tower, left, energy_macs(tower.config, left))

    def reduce(self, step: Step) -> tuple[Tensor, Tensor]:
        prefix = step.num_prefix
        patches_BNC, size_BL = step.x_BLC[:, prefix:], step.sizes()
        size_BN, num_layers = size_BL[:, prefix:], self.tower.config.num_layers
        unit_BNM = F.normalize(step.block.mean_head(step.key_BLC[:, prefix:]), dim=-1)
        K = patches_BNC.shape[1] - self.left[step.layer]
        margin = 0.9 - 0.9 * step.layer / num_layers
        a_BK, b_BK, host_BK, protected = pairs(unit_BNM @ unit_BNM.mT, K, margin)
        hosts_BKC, total_BK = average_into(
            gather_tokens(patches_BNC, b_BK),
            size_BN.gather(1, b_BK),
            gather_tokens(patches_BNC, a_BK),
            size_BN.gather(1, a_BK),
            host_BK,
        )
        tokens = torch.cat([step.x_BLC[:, :prefix], gather_tokens(patches_BNC, protected), hosts_BKC], dim=1)
        return tokens, torch.cat([size_BL[:, :prefix], size_BN.gather(1, protected), total_BK], dim=1)


def build(tower: VisionTower, macs: float, *, first: int = 0, last: int = 11) -> PiToMe:
    """PiToMe in blocks `first` .. `last` of 12 at a budget; as published, in all.

    Raises: UserError for a budget out of reach.
    """
    config = tower.config
    plan = lambda step: left_after(config, step / _STEPS, first, last)  # noqa: E731
    cost = lambda step: PiToMe(tower, plan(step)).macs  # noqa: E731
    return PiToMe(tower, plan(nearest_setting(config, macs, cost, _STEPS)))
