"""PiToMe: merging by energy, so that tokens in large groups of similar ones merge and lonely ones stay; training-free.

Source: Tran et al. 2024, "Accelerating Transformers with Spectrum-Preserving Token Merging", section 3.2, and its image
classification code (docs/rivals.md): a token's energy is its mean over all tokens of f(cos - m), f(x) = x for x >= 0,
else exp(x) - 1; the margin falls with the depth, m = 0.75 - 0.75 l / L. The patches in order of energy go alternately
to A and B, each of A points at its most similar of B, by the keys, mean over heads. In the upper half of the blocks
only the 2K patches of highest energy take part and all of A merge, the others are protected; in the lower half all take
part and the K most similar pairs merge. Means are weighted with sizes. The same ratio of tokens stays in every block.
Deviations: attention is biased by log size, as the paper says; the code leaves that out. The paper's f does not
subtract the margin from cosines above it, its margin starts at 0.9 and its every block protects: here as the code has
it. Each choice is the better one for a frozen tower, measured together (docs/rivals.md).

Letters: B batch, N patches present, K pairs merged, A and X patches of the two sets, U patches left, C width,
M metric channels.
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
_MARGIN = 0.75
"""Margin of the first block."""


def energy(cosine_BNN: Tensor, margin: float) -> Tensor:
    """Energy (B, N): high for a token of a large group."""
    return F.elu(cosine_BNN - margin).mean(-1)


def pairs(cosine_BNN: Tensor, K: int, margin: float, *, protect: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which patches merge: guests (B, K), hosts (B, X), the place (B, K) of each guest's host, and others (B, U).

    Args: protect: whether only the 2K patches of highest energy take part. Returns: int64 indices of patches; N is
    K + X + U.
    """
    num = 2 * K if protect else cosine_BNN.shape[1]
    order_BN = rank(energy(cosine_BNN, margin))
    a_BA, b_BX, protected = order_BN[:, :num:2], order_BN[:, 1:num:2], order_BN[:, num:]
    column_BAX = b_BX.unsqueeze(1).expand(-1, a_BA.shape[1], -1)
    best_BA, host_BA = gather_tokens(cosine_BNN, a_BA).gather(2, column_BAX).max(-1)
    place_BA = rank(best_BA)
    merged_BK, left = place_BA[:, :K], place_BA[:, K:]
    others_BU = torch.cat([protected, a_BA.gather(1, left)], dim=1)
    return a_BA.gather(1, merged_BK), b_BX, host_BA.gather(1, merged_BK), others_BU


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
        margin, protect = _MARGIN * (1 - step.layer / num_layers), 2 * step.layer >= num_layers
        guest_BK, host_BX, place_BK, others_BU = pairs(unit_BNM @ unit_BNM.mT, K, margin, protect=protect)
        hosts_BXC, total_BX = average_into(
            gather_tokens(patches_BNC, host_BX),
            size_BN.gather(1, host_BX),
            gather_tokens(patches_BNC, guest_BK),
            size_BN.gather(1, guest_BK),
            place_BK,
        )
        tokens = torch.cat([step.x_BLC[:, :prefix], gather_tokens(patches_BNC, others_BU), hosts_BXC], dim=1)
        return tokens, torch.cat([size_BL[:, :prefix], size_BN.gather(1, others_BU), total_BX], dim=1)


def build(tower: VisionTower, macs: float, *, first: int = 0, last: int = 11) -> PiToMe:
    """PiToMe in blocks `first` .. `last` of 12 at a budget; as published, in all.

    Raises: UserError for a budget out of reach.
    """
    config = tower.config
    plan = lambda step: left_after(config, step / _STEPS, first, last)  # noqa: E731
    cost = lambda step: PiToMe(tower, plan(step)).macs  # noqa: E731
    return PiToMe(tower, plan(nearest_setting(config, macs, cost, _STEPS)))
