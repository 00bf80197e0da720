"""EViT: keep the patches that the class token attends to, fuse the others into one token; written from the paper.

Source: Liang et al. 2022, "Not All Patches are What You Need", sections 3.2 and 3.3: in a block, between attention and
MLP, the K patches of highest class attention (mean over heads) stay, the others become one token, their average
weighted by that attention. The fused token is an ordinary patch from then on. Published stages: blocks 4, 7 and 10 of
12 with one keep rate.
Deviations: fusing weights add up to one (the paper trains its tower, a frozen one expects tokens of usual length, and
is a little better with them); keep counts are rounded, not up, and meet a budget; the class row of the attention is
computed once more beside fused attention, and counted.

Letters: B batch, L tokens, P prefix tokens, N patches present, K kept, R rest, C width, H heads.
"""

import torch
from torch import Tensor

from eval.rivals.budget import Rival, nearest_setting
from patchrank.errors import UserError
from patchrank.linear import linear
from patchrank.macs import attention_macs, embed_macs, finish_macs, mlp_macs
from patchrank.presets import default_layer
from patchrank.tokens import gather_tokens, num_keep, rank
from patchrank.tower import Block, TowerConfig, VisionTower

_STEPS = 10_000
"""Resolution of the keep rate."""


def class_row(block: Block, x_BLC: Tensor, key_BLC: Tensor, size_BL: Tensor | None = None) -> Tensor:
    """Attention (B, L) of token 0 in this block, mean over heads, from the block's input and keys.

    Args: size_BL float, how many patches a token stands for, where that weighs in the block's attention.
    """
    width = x_BLC.shape[-1]
    bias = None if block.qkv.bias is None else block.qkv.bias[:width]
    q_B1C = linear(block.norm1(x_BLC[:, :1]), block.qkv.weight[:width], bias)
    q, k = (part.unflatten(-1, (block.num_heads, -1)).transpose(1, 2) for part in (q_B1C, key_BLC))
    logit_BH1L = q @ k.mT * q.shape[-1] ** -0.5
    if size_BL is not None:
        logit_BH1L = logit_BH1L + size_BL.log()[:, None, None, :]
    return logit_BH1L.softmax(-1).mean(1).squeeze(1)


def keep_and_fuse(patches_BNC: Tensor, attention_BN: Tensor, K: int) -> Tensor:
    """The K patches of most attention, best first, and the attention-weighted average of the others: (B, K + 1, C)."""
    order_BN = rank(attention_BN)
    rest_BR = order_BN[:, K:]
    weight_BR = attention_BN.gather(1, rest_BR)
    weight_BR = weight_BR / weight_BR.sum(dim=1, keepdim=True)
    fused_B1C = weight_BR.unsqueeze(1) @ gather_tokens(patches_BNC, rest_BR)
    return torch.cat([gather_tokens(patches_BNC, order_BN[:, :K]), fused_B1C], dim=1)


def stages(num_layers: int) -> tuple[int, ...]:
    """The published three cuts, a quarter, a half and three quarters up; none in the last block."""
    return tuple(sorted({layer for i in (1, 2, 3) if 0 < (layer := i * num_layers // 4) < num_layers - 1}))


def counts(config: TowerConfig, layers: tuple[int, ...], keep: float) -> dict[int, int]:
    """{layer: K} of stages that keep the share `keep` of what is there; a stage that would fuse nothing is left out."""
    left, found = config.num_patches, {}
    for layer in layers:
        K = num_keep(keep, left)
        if K < left - 1:
            found[layer], left = K, K + 1
    return found


def evit_macs(config: TowerConfig, K_of: dict[int, int]) -> int:
    """MACs per image: blocks on what is left, the class row again and the fusing product at every stage."""
    patches, prefix, width = config.num_patches, config.num_prefix, config.width
    total, done = embed_macs(config), 0
    for layer, K in K_of.items():
        tokens = prefix + patches
        total += (layer - done) * (attention_macs(config, tokens, tokens) + mlp_macs(config, tokens))
        total += attention_macs(config, tokens, tokens) + width * width + width * tokens + width * (patches - K)
        patches, done = K + 1, layer + 1
        total += mlp_macs(config, prefix + patches)
    return total + finish_macs(config, prefix + patches, done)


class EViT(Rival):
    """A tower with a stage in each block of `K_of`."""

    def __init__(self, tower: VisionTower, K_of: dict[int, int]) -> None:
        super().__init__(tower, evit_macs(tower.config, K_of))
        self.K_of = K_of

    @property
    def first_layer(self) -> int | None:
        return min(self.K_of, default=None)

    def forward_from(self, x_BLC: Tensor, layer: int = 0) -> Tensor:
        prefix, done = self.tower.config.num_prefix, layer
        for stage, K in self.K_of.items():
            x_BLC, block = self.tower.run(x_BLC, done, stage), self.tower.blocks[stage]
            after_BLC, key_BLC = block.attend(x_BLC)
            attention_BN = class_row(block, x_BLC, key_BLC)[:, prefix:]
            kept = keep_and_fuse(after_BLC[:, prefix:], attention_BN, K)
            x_BLC, done = block.mlp(torch.cat([after_BLC[:, :prefix], kept], dim=1)), stage + 1
        return self.tower.finish(x_BLC, done)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.forward_from(self.tower.embed(image_BCHW))


def build(tower: VisionTower, macs: float, *, staged: bool = False) -> EViT:
    """EViT with the keep rate that meets the budget; one cut at a quarter of the depth, or the three stages.

    Raises: UserError for a tower without class token or a budget out of reach.
    """
    config = tower.config
    if config.num_prefix == 0:
        raise UserError("evit: needs a class token, which this tower has not; compare with tome")
    layers = stages(config.num_layers) if staged else (default_layer(config.num_layers),)
    cost = lambda steps: evit_macs(config, counts(config, layers, steps / _STEPS))  # noqa: E731
    return EViT(tower, counts(config, layers, nearest_setting(config, macs, cost, _STEPS) / _STEPS))
