"""ToMe: Token Merging by bipartite soft matching, written from the paper; training-free, inside a frozen tower.

Source: Bolya et al. 2023, "Token Merging: Your ViT But Faster", section 3: between attention and MLP of a block the
tokens are split into alternating sets A and B; each token of A points at its most similar one in B by the keys, mean
over heads; the r strongest pairs are merged by a mean weighted with sizes; attention adds log size to a key's logit.
Deviations: none in the merging. r: "constant in every block" in integers cannot meet a budget to 1 %, so the first few
blocks merge one token more; the last block of a tower with class pooling computes the class row only, as in every row.

Letters: B batch, L tokens, P prefix tokens, A tokens of the first set, R = r merged, U = A - R left, C width,
M metric channels.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.rivals.budget import Rival, nearest_setting
from patchrank.macs import attention_macs, embed_macs, head_macs, mlp_macs
from patchrank.tokens import gather_tokens, rank
from patchrank.tower import TowerConfig, VisionTower

Match = tuple[Tensor, Tensor, Tensor]
"""(merged_BR, left_BU) indices into A, and (host_BR) the index into B that each merged token goes to."""


def match(metric_BLM: Tensor, r: int, num_prefix: int) -> Match:
    """Bipartite soft matching: A is tokens 0, 2, 4, ..., B is tokens 1, 3, 5, ...; the r most similar pairs.

    Args: metric (B, L, M) float; the first `num_prefix` tokens are never merged, nor merged into.
    Returns: merged (B, r) and left (B, U) int64 into A (left in rising order), host (B, r) int64 into B.
    """
    unit_BLM = F.normalize(metric_BLM, dim=-1)
    similarity = unit_BLM[:, ::2] @ unit_BLM[:, 1::2].mT
    similarity[:, : (num_prefix + 1) // 2] = -torch.inf
    similarity[:, :, : num_prefix // 2] = -torch.inf
    best_BA, host_BA = similarity.max(dim=-1)
    order_BA = rank(best_BA)
    merged_BR, left_BU = order_BA[:, :r], order_BA[:, r:].sort(dim=1).values
    return merged_BR, left_BU, host_BA.gather(1, merged_BR)


def merge(x_BLC: Tensor, size_BL: Tensor, matched: Match) -> tuple[Tensor, Tensor]:
    """Merged tokens join their hosts, a mean by size.

    Args: tokens (B, L, C) and sizes (B, L) float. Returns: both with L - r: what is left of A, then B.
    """
    merged_BR, left_BU, host_BR = matched
    a_BAC, b_BXC, size_BA, size_BX = x_BLC[:, ::2], x_BLC[:, 1::2], size_BL[:, ::2], size_BL[:, 1::2]
    guest_BR = size_BA.gather(1, merged_BR)
    guest_BRC = gather_tokens(a_BAC, merged_BR) * guest_BR.unsqueeze(-1)
    total_BX = size_BX.scatter_add(1, host_BR, guest_BR)
    sum_BXC = (b_BXC * size_BX.unsqueeze(-1)).scatter_add(1, host_BR.unsqueeze(-1).expand_as(guest_BRC), guest_BRC)
    hosts_BXC = sum_BXC / total_BX.unsqueeze(-1)
    left_BUC = gather_tokens(a_BAC, left_BU)
    return torch.cat([left_BUC, hosts_BXC], dim=1), torch.cat([size_BA.gather(1, left_BU), total_BX], dim=1)


def spread_r(config: TowerConfig, blocks: tuple[int, ...], total: int) -> dict[int, int]:
    """{layer: r} with `total` spread evenly over `blocks`, the first ones taking the remainder.

    A block merges at most half of its patches; what is more is lost, as with the paper's constant r.
    """
    each, more = divmod(total, len(blocks))
    left, r = config.num_patches, {}
    for place, layer in enumerate(blocks):
        r[layer] = min(each + (place < more), left // 2)
        left -= r[layer]
    return r


def tome_macs(config: TowerConfig, r: dict[int, int]) -> int:
    """MACs per image: blocks on what is left, and the similarities of every merging block."""
    num_tokens = config.num_prefix + config.num_patches
    metric_dim = config.width // config.num_heads
    total = embed_macs(config)
    for layer in range(config.num_layers):
        if _row_only(config, layer):
            total += attention_macs(config, num_tokens, 1) + mlp_macs(config, 1)
            continue
        total += attention_macs(config, num_tokens, num_tokens)
        if r.get(layer, 0):
            total += (num_tokens - num_tokens // 2) * (num_tokens // 2) * metric_dim
            num_tokens -= r[layer]
        total += mlp_macs(config, num_tokens)
    return total + head_macs(config, num_tokens)


def _row_only(config: TowerConfig, layer: int) -> bool:
    return config.pool == "class" and layer == config.num_layers - 1


class ToMe(Rival):
    """A tower that merges `r[layer]` tokens in each block of `r`."""

    def __init__(self, tower: VisionTower, r: dict[int, int]) -> None:
        super().__init__(tower, tome_macs(tower.config, r))
        self.r = r

    def tokens(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, C) behind the last block (class row only, where it pools so) and their sizes (B, L')."""
        config = self.tower.config
        x_BLC = self.tower.embed(image_BCHW)
        size_BL, bias_B11L = x_BLC.new_ones(x_BLC.shape[:2]), None
        for layer, block in enumerate(self.tower.blocks):
            if _row_only(config, layer):
                x_BLC = block.mlp(block.attend_rows(x_BLC, 1, bias_B11L))
                break
            x_BLC, key_BLC = block.attend(x_BLC, bias_B11L)
            if self.r.get(layer, 0):
                matched = match(block.mean_head(key_BLC), self.r[layer], config.num_prefix)
                x_BLC, size_BL = merge(x_BLC, size_BL, matched)
                bias_B11L = size_BL.log()[:, None, None, :]
            x_BLC = block.mlp(x_BLC)
        return x_BLC, size_BL

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.tower.head(*self.tokens(image_BCHW))


def blocks_between(config: TowerConfig, first: int, last: int) -> tuple[int, ...]:
    """Blocks `first` .. `last` of 12, and the same part of another depth; never one that computes one row."""
    start, stop = first * config.num_layers // 12, -(-(last + 1) * config.num_layers // 12)
    return tuple(layer for layer in range(start, stop) if not _row_only(config, layer))


def build(tower: VisionTower, macs: float, *, first: int = 0, last: int = 11) -> ToMe:
    """ToMe at a budget, merging in blocks `first` .. `last` of 12; as published, in all.

    Raises: UserError for a budget out of reach.
    """
    config = tower.config
    layers = blocks_between(config, first, last)
    merges = config.num_patches * len(layers)
    plan = partial(spread_r, config, layers)
    kept = nearest_setting(config, macs, lambda kept: tome_macs(config, plan(merges - kept)), merges, 0)
    return ToMe(tower, plan(merges - kept))
