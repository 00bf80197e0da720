"""DTEM's relaxed merging: every token merges a little, so that the embedding gets a gradient.

Every token of A has a gate (how far it is merged: a sigmoid around the r-th best cosine) and a weight for each possible
host (a softmax over its cosines). What it gives is added to its hosts, what it keeps is its weight as a key. The r
tokens that the hard matching merges stay in the sequence until the next merging block, then they are gone.
Source: Lee & Hong 2024, section 3.2 (soft grouping, soft merging, sizes as attention weights). Deviations: the gate is
a sigmoid where the paper relaxes the top-k by iteration over each token's three best hosts; the tokens that leave are
those of the hard matching, theirs are the lightest; gradients also reach an embedding through the ones above it, theirs
stop at an embedding's input; the loss is the distance to the unpruned feature, without labels. Temperature: 0.03 in
cosines; on a ViT-Ti its gradient lowered the loss of the hard walk, that of 0.1 and a straight-through forward did not.
As it goes to zero the features become those of the hard walk.

Letters: B batch, L tokens alive (prefix first), S tokens in the sequence, A and X tokens of the two sets, C width.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.rivals.dtem import Embedding
from eval.rivals.tome import Match, match, prefix_first
from eval.rivals.walk import inner_layers
from patchrank.tokens import gather_tokens
from patchrank.tower import VisionTower

SOFTNESS = 0.03
_CLOSED = 1e-4
"""Least weight of a merged token as a key: its logarithm stays finite."""


def soft_match(metric_BLM: Tensor, r: int, num_prefix: int, softness: float) -> tuple[Match, Tensor, Tensor]:
    """The hard matching, gates (B, A) in 0 .. 1 of being merged, and host weights (B, A, X); 1 <= r <= half."""
    matched = match(metric_BLM.detach(), r, num_prefix)
    unit_BLM = F.normalize(metric_BLM, dim=-1)
    cosine_BAX = unit_BLM[:, ::2] @ unit_BLM[:, 1::2].mT
    fixed_AX = torch.zeros(cosine_BAX.shape[1:], dtype=torch.bool, device=cosine_BAX.device)
    fixed_AX[: (num_prefix + 1) // 2] = True
    fixed_AX[:, : num_prefix // 2] = True
    cosine_BAX = cosine_BAX.masked_fill(fixed_AX, -2.0)
    best_BA = cosine_BAX.amax(-1)
    ordered_BA = F.pad(best_BA.detach().sort(dim=-1, descending=True).values, (0, 1), value=-2.0)
    border_B1 = ordered_BA[:, r - 1 : r + 1].mean(-1, keepdim=True)
    gate_BA = ((best_BA - border_B1) / softness).sigmoid()
    return matched, gate_BA, (cosine_BAX / softness).softmax(-1)


def soft_merge(
    x_BLC: Tensor, size_BL: Tensor, metric_BLM: Tensor, r: int, num_prefix: int, softness: float
) -> tuple[Tensor, Tensor]:
    """Tokens (B, L, C), the r that are merged last, and their weights (B, L) as keys; those alive count L - r."""
    (merged_BR, left_BU, _), gate_BA, host_BAX = soft_match(metric_BLM, r, num_prefix, softness)
    a_BAC, size_BA, size_BX1 = x_BLC[:, ::2], size_BL[:, ::2], size_BL[:, 1::2].unsqueeze(-1)
    share_BA1 = (gate_BA * size_BA).unsqueeze(-1)
    total_BX1 = size_BX1 + host_BAX.mT @ share_BA1
    hosts_BXC = (x_BLC[:, 1::2] * size_BX1 + host_BAX.mT @ (share_BA1 * a_BAC)) / total_BX1
    kept_BA = ((1 - gate_BA) * size_BA).clamp_min(_CLOSED)
    alive_BLC = prefix_first(gather_tokens(a_BAC, left_BU), hosts_BXC, num_prefix)
    weight_BL = prefix_first(kept_BA.gather(1, left_BU), total_BX1.squeeze(-1), num_prefix)
    tokens = torch.cat([alive_BLC, gather_tokens(a_BAC, merged_BR)], dim=1)
    return tokens, torch.cat([weight_BL, kept_BA.gather(1, merged_BR)], dim=1)


def soft_features(
    tower: VisionTower, embedding: Embedding, r: Mapping[int, int], x_BLC: Tensor, softness: float = SOFTNESS
) -> Tensor:
    """Features (B, D) of tokens (B, P + N, C) that enter block 0, merged by `embedding` at the counts `r`."""
    config = tower.config
    weight_BS, num_alive = x_BLC.new_ones(x_BLC.shape[:2]), x_BLC.shape[1]
    for layer in inner_layers(config):
        block, before_BSC = tower.blocks[layer], x_BLC
        x_BLC, _ = block.attend(x_BLC, weight_BS.log()[:, None, None, :])
        if r.get(layer, 0):
            metric_BLM = embedding(layer, block.norm1(before_BSC[:, :num_alive]))
            alive_BLC, size_BL = x_BLC[:, :num_alive], weight_BS[:, :num_alive]
            x_BLC, weight_BS = soft_merge(alive_BLC, size_BL, metric_BLM, r[layer], config.num_prefix, softness)
            num_alive -= r[layer]
        x_BLC = block.mlp(x_BLC)
    if config.pool == "class":
        return tower.finish(x_BLC, config.num_layers - 1, weight_BS)
    return tower.head(x_BLC, weight_BS)
