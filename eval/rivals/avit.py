"""A-ViT-style halting: tokens stop when their accumulated halting score is high; training-free, at a fixed count.

Source: Yin et al. 2022, "A-ViT: Adaptive Tokens for Efficient Vision Transformer", section 3: behind every block a
token's halting score is sigmoid(5 t - 10) of one of its channels t (the first); a token whose scores add up to one is
zeroed and masked from then on.
The numbers 5 and 10 are the paper's; its repository trains with 10 and 30 or 75.
Deviations: the paper trains the tower with a ponder loss, which teaches that channel; here the tower is frozen, as in
Patch Ranking's comparison. Tokens halt by rank of the accumulated score, the same number in every image, so that a
budget is met and batches stay dense; the answer is the class token's last state, not its mean over blocks.

Letters: B batch, N patches present, K kept, C width.
"""

import torch
from torch import Tensor

from eval.rivals.budget import Rival, nearest_setting
from patchrank.macs import pruned_macs
from patchrank.spec import PruneSpec
from patchrank.tokens import gather_tokens, keep_top, num_keep
from patchrank.tower import TowerConfig, VisionTower

_STEPS = 10_000
_SCALE, _SHIFT = 5.0, -10.0


def halting(patches_BNC: Tensor) -> Tensor:
    """Halting score (B, N) in (0, 1) of tokens behind a block."""
    return torch.sigmoid(_SCALE * patches_BNC[..., 0].float() + _SHIFT)


def spec_at(config: TowerConfig, share: float) -> PruneSpec:
    """Every block but the first sees `share` of the patches of the one below; where none halts there is no cut."""
    left, cuts = config.num_patches, []
    for layer in range(1, config.num_layers):
        K = num_keep(share**layer, config.num_patches)
        if K < left:
            cuts.append((layer, K / config.num_patches))
            left = K
    return PruneSpec(cuts=tuple(cuts), rest="drop", select="topk")


class AViT(Rival):
    """A tower whose tokens halt before the blocks of a drop spec, by their accumulated score."""

    def __init__(self, tower: VisionTower, spec: PruneSpec) -> None:
        super().__init__(tower, pruned_macs(tower.config, spec))
        self.K_of = dict(spec.counts(tower.config.num_patches))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        prefix, last = self.tower.config.num_prefix, self.tower.config.num_layers - 1
        x_BLC = self.tower.embed(image_BCHW)
        total_BN = x_BLC.new_zeros(x_BLC.shape[0], x_BLC.shape[1] - prefix)
        for layer, block in enumerate(self.tower.blocks[:last]):
            x_BLC = block(x_BLC)
            total_BN = total_BN + halting(x_BLC[:, prefix:])
            if layer + 1 in self.K_of:
                keep_BK = keep_top(-total_BN, self.K_of[layer + 1])
                total_BN = total_BN.gather(1, keep_BK)
                x_BLC = torch.cat([x_BLC[:, :prefix], gather_tokens(x_BLC[:, prefix:], keep_BK)], dim=1)
        return self.tower.finish(x_BLC, last)


def build(tower: VisionTower, macs: float) -> AViT:
    """Halting at a budget, the same share in every block. Raises: UserError for a budget out of reach."""
    config = tower.config
    cost = lambda step: pruned_macs(config, spec_at(config, step / _STEPS))  # noqa: E731
    return AViT(tower, spec_at(config, nearest_setting(config, macs, cost, _STEPS) / _STEPS))
