"""ToMe: Token Merging by bipartite soft matching, written from the paper; training-free, inside a frozen tower.

Source: Bolya et al. 2023, "Token Merging: Your ViT But Faster", section 3: between attention and MLP of a block the
tokens are split into alternating sets A and B; each token of A points at its most similar one in B by the keys, mean
over heads; the r strongest pairs are merged by a mean weighted with sizes; attention adds log size to a key's logit.
Deviations: none in the merging, checked beside the authors' code (docs/rivals.md). r: "constant in every block" in
integers cannot meet a budget to 1 %, so the first few blocks merge one token more; the last block of a tower with class
pooling computes the class row only, as in every row.
One-shot: all merges in one block, in as many rounds of matching as it takes (a round merges at most half of the
patches); keys of merged tokens are averaged as the tokens are.

Letters: B batch, L tokens, P prefix tokens, A tokens of the first set, R = r merged, U = A - R left, C width,
M metric channels.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.rivals.budget import nearest_setting
from eval.rivals.walk import Step, Walk, blocks_between, walk_macs
from patchrank.presets import default_layer
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


def average_into(
    host_BXC: Tensor, size_BX: Tensor, guest_BRC: Tensor, size_BR: Tensor, host_BR: Tensor
) -> tuple[Tensor, Tensor]:
    """Hosts (B, X, C) averaged by size with the guests that `host_BR` sends to them, and their sizes (B, X)."""
    total_BX = size_BX.scatter_add(1, host_BR, size_BR)
    weighted_BRC = guest_BRC * size_BR.unsqueeze(-1)
    index_BRC = host_BR.unsqueeze(-1).expand_as(weighted_BRC)
    sum_BXC = (host_BXC * size_BX.unsqueeze(-1)).scatter_add(1, index_BRC, weighted_BRC)
    return sum_BXC / total_BX.unsqueeze(-1), total_BX


def merge(x_BLC: Tensor, size_BL: Tensor, matched: Match, num_prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Merged tokens join their hosts, a mean by size.

    Args: tokens (B, L, C) and sizes (B, L) float.
    Returns: both with L - r: the prefix in its order, then what is left of A, then B.
    """
    merged_BR, left_BU, host_BR = matched
    a_BAC, size_BA = x_BLC[:, ::2], size_BL[:, ::2]
    guest_BRC, guest_BR = gather_tokens(a_BAC, merged_BR), size_BA.gather(1, merged_BR)
    hosts_BXC, total_BX = average_into(x_BLC[:, 1::2], size_BL[:, 1::2], guest_BRC, guest_BR, host_BR)
    return (
        prefix_first(gather_tokens(a_BAC, left_BU), hosts_BXC, num_prefix),
        prefix_first(size_BA.gather(1, left_BU), total_BX, num_prefix),
    )


def prefix_first(a_BU: Tensor, b_BX: Tensor, num_prefix: int) -> Tensor:
    """What is left of A (B, U, ...), then B (B, X, ...), but the prefix tokens of both in front, in their order."""
    if num_prefix < 2:
        return torch.cat([a_BU, b_BX], dim=1)
    front = [(a_BU, b_BX)[place % 2][:, place // 2].unsqueeze(1) for place in range(num_prefix)]
    return torch.cat([*front, a_BU[:, (num_prefix + 1) // 2 :], b_BX[:, num_prefix // 2 :]], dim=1)


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


def rounds(num_patches: int, r: int) -> list[int]:
    """Merges of each round of matching in one block: at most half of the patches that are left."""
    found = []
    while r > 0 and num_patches > 1:
        found.append(min(r, num_patches // 2))
        num_patches, r = num_patches - found[-1], r - found[-1]
    return found


def left_after(config: TowerConfig, r: Mapping[int, int]) -> dict[int, int]:
    """{layer: patches behind it} of the blocks that merge anything."""
    patches, left = config.num_patches, {}
    for layer in sorted(r):
        if r[layer]:
            patches -= r[layer]
            left[layer] = patches
    return left


def matching_macs(config: TowerConfig, r: Mapping[int, int], metric_dim: int | None = None) -> dict[int, int]:
    """{layer: MACs of its similarities}; metric_dim: channels compared, None for those of a head's keys."""
    channels = config.width // config.num_heads if metric_dim is None else metric_dim
    patches, macs = config.num_patches, {}
    for layer in sorted(r):
        for merges in rounds(patches, r[layer]):
            num_tokens = config.num_prefix + patches
            macs[layer] = macs.get(layer, 0) + (num_tokens - num_tokens // 2) * (num_tokens // 2) * channels
            patches -= merges
    return macs


def tome_macs(config: TowerConfig, r: Mapping[int, int]) -> int:
    """MACs per image of merging `r[layer]` tokens in each block of `r`."""
    return walk_macs(config, left_after(config, r), matching_macs(config, r))


class ToMe(Walk):
    """A tower that merges `r[layer]` tokens in each block of `r`; `choice` {layer: MACs}, None for the matching's."""

    def __init__(self, tower: VisionTower, r: Mapping[int, int], choice: Mapping[int, int] | None = None) -> None:
        choice = matching_macs(tower.config, r) if choice is None else choice
        super().__init__(tower, left_after(tower.config, r), choice)
        self.r = dict(r)

    def metric(self, step: Step) -> Tensor:
        """What tokens are compared by, (B, L, M)."""
        return step.block.mean_head(step.key_BLC)

    def join(self, layer: int, x_BLC: Tensor, size_BL: Tensor, matched: Match) -> tuple[Tensor, Tensor]:
        """Tokens and sizes behind one round of matching."""
        return merge(x_BLC, size_BL, matched, self.tower.config.num_prefix)

    def reduce(self, step: Step) -> tuple[Tensor, Tensor]:
        x_BLC, size_BL, metric_BLM = step.x_BLC, step.sizes(), self.metric(step)
        *others, last = rounds(x_BLC.shape[1] - step.num_prefix, self.r[step.layer])
        for r in others:
            matched = match(metric_BLM, r, step.num_prefix)
            metric_BLM = merge(metric_BLM, size_BL, matched, step.num_prefix)[0]
            x_BLC, size_BL = self.join(step.layer, x_BLC, size_BL, matched)
        return self.join(step.layer, x_BLC, size_BL, match(metric_BLM, last, step.num_prefix))


def r_at(tower: VisionTower, macs: float, first: int, last: int, rival: type[ToMe] = ToMe, **options) -> ToMe:
    """A method that merges as ToMe does in blocks `first` .. `last` of 12, with the r that meets a budget.

    Raises: UserError for a budget out of reach.
    """
    config = tower.config
    layers = blocks_between(config, first, last)
    merges = config.num_patches * len(layers)
    plan = partial(spread_r, config, layers)
    cost = lambda kept: rival(tower, plan(merges - kept), **options).macs  # noqa: E731
    return rival(tower, plan(merges - nearest_setting(config, macs, cost, merges, 0)), **options)


def build(tower: VisionTower, macs: float, *, first: int = 0, last: int = 11) -> ToMe:
    """ToMe at a budget, merging in blocks `first` .. `last` of 12; as published, in all.

    Raises: UserError for a budget out of reach.
    """
    return r_at(tower, macs, first, last)


def one_shot(tower: VisionTower, macs: float) -> ToMe:
    """ToMe with all merges in one block, a quarter up. Raises: UserError for a budget out of reach."""
    config = tower.config
    layer = default_layer(config.num_layers)
    cost = lambda kept: tome_macs(config, {layer: config.num_patches - kept})  # noqa: E731
    return ToMe(tower, {layer: config.num_patches - nearest_setting(config, macs, cost, config.num_patches)})
