"""Gate gradients: what closing (or opening) each patch a little would do, for all patches in one backward pass.

The pruned walk is made smooth: every patch stays in the sequence with a gate g, 1 for kept and almost 0 for the rest.
Its attention weight as a key is multiplied by g; under fold the share 1 - g of its content moves to its nearest kept
patch. At gates of 0 and 1 this is the true pruned walk, so gradients are taken at real keep sets, never at half-open
ones that no inference would see.

Letters: V variants, N patches, P prefix tokens, C width, M metric channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from patchrank.search.variants import Variants

_CLOSED = 1e-4
"""Gate of a patch that is gone: its weight is lost in rounding, its gradient is not."""


def nearest_kept(metric_NM: Tensor, mask_VN: Tensor) -> Tensor:
    """One-hot (V, N, N) float: row i marks the kept patch nearest to i by cosine, other than i itself."""
    unit_NM = F.normalize(metric_NM, dim=-1)
    cosine_NN = (unit_NM @ unit_NM.mT).fill_diagonal_(-2.0)
    cosine_VNN = cosine_NN.unsqueeze(0).masked_fill(~mask_VN.unsqueeze(1), -2.0)
    return F.one_hot(cosine_VNN.argmax(-1), mask_VN.shape[1]).to(metric_NM.dtype)


def soft_fold(x_VNC: Tensor, gate_VN: Tensor, host_VNN: Tensor, merge_norm: str) -> tuple[Tensor, Tensor]:
    """Tokens (V, N, C) and sizes (V, N) after every patch gave the share 1 - gate of itself to its host."""
    share_VN1 = (1 - gate_VN).unsqueeze(-1)
    size_VN = 1 + (host_VNN.mT @ share_VN1).squeeze(-1)
    merged_VNC = (x_VNC + host_VNN.mT @ (share_VN1 * x_VNC)) / size_VN.unsqueeze(-1)
    if merge_norm == "mean":
        return merged_VNC, size_VN
    norm_VN1 = x_VNC.norm(dim=-1, keepdim=True)
    target_VN1 = (norm_VN1 + host_VNN.mT @ (share_VN1 * norm_VN1)) / size_VN.unsqueeze(-1)
    return merged_VNC * (target_VN1 / merged_VNC.norm(dim=-1, keepdim=True).clamp_min(1e-6)), size_VN


def gated_features(variants: Variants, mask_VN: Tensor, gate_VN: Tensor) -> Tensor:
    """Features (V, D) of the smooth walk; differentiable in `gate_VN` (V, N)."""
    state, tower = variants.state, variants.tower
    num_prefix = state.num_prefix
    x_VNC = state.patches_BNC.expand(len(mask_VN), -1, -1)
    weight_VN = gate_VN
    if variants.spec.rest == "fold":
        host_VNN = nearest_kept(variants.metric_1NM[0], mask_VN)
        x_VNC, size_VN = soft_fold(x_VNC, gate_VN, host_VNN, variants.spec.merge_norm)
        weight_VN = gate_VN * size_VN
    prefix_VPC = state.x_BLC[:, :num_prefix].expand(len(mask_VN), -1, -1)
    size_VL = torch.cat([weight_VN.new_ones(len(mask_VN), num_prefix), weight_VN], dim=1)
    return tower.finish(torch.cat([prefix_VPC, x_VNC], dim=1), variants.layer, size_VL, num_prefix)


def gate_gradients(
    variants: Variants, mask_VN: Tensor, damage: Callable[[Tensor], Tensor], num_probes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """First-order damage of every gate and how much each gate moves the feature at all, from one forward pass.

    Args: keep masks (V, N) bool; num_probes >= 1 random output directions.
    Returns: d damage / d gate (V, N), and an unbiased estimate of |d unit feature / d gate|^2 (V, N).
    Source: first-order gate sensitivities as in Michel et al. 2019 (head gates), taken at pruned points because the
    preservation criterion is stationary at the full set; squared norms by random projections (Hutchinson 1990).
    """
    with torch.enable_grad():
        open_or_closed = torch.where(mask_VN, 1.0, _CLOSED)
        gate_VN = open_or_closed.to(variants.state.x_BLC.dtype).requires_grad_(True)
        feature_VD = gated_features(variants, mask_VN, gate_VN)
        (gradient_VN,) = torch.autograd.grad(damage(feature_VD).sum(), gate_VN, retain_graph=True)
        unit_VD = F.normalize(feature_VD, dim=-1)
        squared_VN = torch.zeros_like(gradient_VN)
        for probe in range(num_probes):
            direction_VD = torch.randn(unit_VD.shape, generator=generator).to(unit_VD.device)
            more = probe < num_probes - 1
            (slope_VN,) = torch.autograd.grad((unit_VD * direction_VD).sum(), gate_VN, retain_graph=more)
            squared_VN += slope_VN.square() / num_probes
    return gradient_VN, squared_VN
