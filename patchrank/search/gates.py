"""Gate gradients: what closing (or opening) each patch a little would do, for all patches in one backward pass.

The pruned walk is made smooth: every patch stays in the sequence with a gate g, 1 for kept and almost 0 for the rest.
Its attention weight as a key is multiplied by g; under fold the share 1 - g of its content moves to its nearest kept
patch. At gates of 0 and 1 this is the true pruned walk, so gradients are taken at real keep sets, never at half-open
ones that no inference would see.

Letters: V variants, N patches, K kept, P prefix tokens, C width, D feature, M metric channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from patchrank.pruned import State
    from patchrank.search.variants import Variants

_CLOSED = 1e-4
"""Gate of a patch that is gone: its weight is lost in rounding, its gradient is not."""


def nearest_kept(metric_NM: Tensor, mask_VN: Tensor) -> Tensor:
    """One-hot (V, N, N) float: row i marks the kept patch nearest to i by cosine, other than i itself."""
    unit_NM = F.normalize(metric_NM, dim=-1)
    cosine_NN = (unit_NM @ unit_NM.mT).fill_diagonal_(-2.0)
    cosine_VNN = cosine_NN.unsqueeze(0).masked_fill(~mask_VN.unsqueeze(1), -2.0)
    return F.one_hot(cosine_VNN.argmax(-1), mask_VN.shape[1]).to(metric_NM.dtype)


def soft_fold(
    x_VNC: Tensor, gate_VN: Tensor, size_VN: Tensor, host_VNN: Tensor, merge_norm: str
) -> tuple[Tensor, Tensor]:
    """Tokens (V, N, C) and sizes (V, N) after every token gave the share 1 - gate of itself to its host."""
    size_VN1 = size_VN.unsqueeze(-1)
    leaving_VN1 = (1 - gate_VN).unsqueeze(-1) * size_VN1
    total_VN1 = size_VN1 + host_VNN.mT @ leaving_VN1
    merged_VNC = (size_VN1 * x_VNC + host_VNN.mT @ (leaving_VN1 * x_VNC)) / total_VN1
    if merge_norm == "mean":
        return merged_VNC, total_VN1.squeeze(-1)
    norm_VN1 = x_VNC.norm(dim=-1, keepdim=True)
    target_VN1 = (size_VN1 * norm_VN1 + host_VNN.mT @ (leaving_VN1 * norm_VN1)) / total_VN1
    unit_VNC = merged_VNC / merged_VNC.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return unit_VNC * target_VN1, total_VN1.squeeze(-1)


def gated_features(variants: Variants, mask_VN: Tensor, gate_VN: Tensor) -> Tensor:
    """Features (V, D) of the smooth walk with all patches in the sequence; differentiable in `gate_VN` (V, N)."""
    x_VNC = variants.state.patches_BNC.expand(len(mask_VN), -1, -1)
    host_VNN = nearest_kept(variants.metric_1NM[0], mask_VN) if variants.spec.rest == "fold" else None
    return _finish(variants, x_VNC, gate_VN, torch.ones_like(gate_VN), host_VNN)


def closing_features(variants: Variants, after: State, gate_1K: Tensor) -> Tensor:
    """Features (1, D) of the smooth walk with kept patches only, behind a cut; differentiable in the gates."""
    size_1K, host_1KK = torch.ones_like(gate_1K), None
    if variants.spec.rest == "fold":
        size_1K = after.size_BN
        kept_1K = torch.ones_like(gate_1K, dtype=torch.bool)
        host_1KK = nearest_kept(variants.metric_1NM[0][after.position_BN[0]], kept_1K)
    return _finish(variants, after.patches_BNC, gate_1K, size_1K, host_1KK)


def _finish(variants: Variants, x_VNC: Tensor, gate_VN: Tensor, size_VN: Tensor, host_VNN: Tensor | None) -> Tensor:
    num_prefix = variants.state.num_prefix
    if host_VNN is not None:
        x_VNC, size_VN = soft_fold(x_VNC, gate_VN, size_VN, host_VNN, variants.spec.merge_norm)
    prefix_VPC = variants.state.x_BLC[:, :num_prefix].expand(len(x_VNC), -1, -1)
    size_VL = torch.cat([gate_VN.new_ones(len(x_VNC), num_prefix), gate_VN * size_VN], dim=1)
    return variants.tower.finish(torch.cat([prefix_VPC, x_VNC], dim=1), variants.layer, size_VL, num_prefix)


def gate_gradients(
    variants: Variants, mask_VN: Tensor, damage: Callable[[Tensor], Tensor], num_probes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`slopes` of all patches at keep masks (V, N) bool: gradients and squared sensitivities (V, N)."""
    gate_VN = torch.where(mask_VN, 1.0, _CLOSED).to(variants.state.x_BLC.dtype)
    features = partial(gated_features, variants, mask_VN)
    _, gradient_VN, squared_VN = slopes(features, gate_VN, damage, num_probes, generator)
    return gradient_VN, squared_VN


def closing_gradients(
    variants: Variants, after: State, damage: Callable[[Tensor], Tensor], num_probes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """`slopes` (1, D), (1, K), (1, K) of the patches kept behind a cut; gone ones are not asked, nor paid for."""
    gate_1K = after.patches_BNC.new_ones(after.position_BN.shape)
    return slopes(partial(closing_features, variants, after), gate_1K, damage, num_probes, generator)


def slopes(
    features: Callable[[Tensor], Tensor],
    gate_VN: Tensor,
    damage: Callable[[Tensor], Tensor],
    num_probes: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """First-order damage of every gate and how much each gate moves the feature at all, from one forward pass.

    Args: features: gates (V, N) -> (V, D); num_probes >= 1 random output directions.
    Returns: features (V, D), d damage / d gate (V, N), and an unbiased estimate of |d unit feature / d gate|^2 (V, N).
    Source: first-order gate sensitivities as in Michel et al. 2019 (head gates), taken at pruned points because the
    preservation criterion is stationary at the full set; squared norms by random projections (Hutchinson 1990).
    """
    with torch.enable_grad():
        gate_VN = gate_VN.detach().requires_grad_(True)
        feature_VD = features(gate_VN)
        (gradient_VN,) = torch.autograd.grad(damage(feature_VD).sum(), gate_VN, retain_graph=True)
        unit_VD = F.normalize(feature_VD, dim=-1)
        squared_VN = torch.zeros_like(gradient_VN)
        for probe in range(num_probes):
            direction_VD = torch.randn(unit_VD.shape, generator=generator).to(unit_VD.device)
            more = probe < num_probes - 1
            (slope_VN,) = torch.autograd.grad((unit_VD * direction_VD).sum(), gate_VN, retain_graph=more)
            squared_VN += slope_VN.square() / num_probes
    return feature_VD.detach(), gradient_VN, squared_VN
