"""The closed-form end of a calibration: ridge regression from pruned to unpruned features, folded into the projection.

Letters: n images, C pooled width, D feature.
"""

from dataclasses import replace

import torch
from torch import Tensor

from patchrank.pruned import PrunedTower
from patchrank.tower import VisionTower

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Ridge strengths to choose from, in units of the mean variance of a feature."""


def ridge_readout(feature_nD: Tensor, dense_nD: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Map (D, D) and offset (D,) float32 with dense ~ map @ feature + offset, drawn towards the identity.

    Minimises the squared error plus strength * n * v * |map - 1|^2, v the mean variance of the features; solved in
    float64. Args: features (n, D) of pruned and unpruned images, n >= 2; strength > 0.
    Source: Hoerl & Kennard 1970, with the identity in place of zero.
    """
    x_nD, y_nD = feature_nD.double(), dense_nD.double()
    mean_D, target_D = x_nD.mean(0), y_nD.mean(0)
    covariance_DD = (x_nD - mean_D).T @ (x_nD - mean_D) / len(x_nD)
    cross_DD = (y_nD - target_D).T @ (x_nD - mean_D) / len(x_nD)
    ridge_DD = strength * covariance_DD.diagonal().mean() * torch.eye(len(mean_D), dtype=torch.float64).to(x_nD.device)
    map_DD = torch.linalg.solve(covariance_DD + ridge_DD, (cross_DD + ridge_DD).T).T
    return map_DD.float(), (target_D - map_DD @ mean_D).float()


def with_readout(pruned: PrunedTower, map_DD: Tensor, offset_D: Tensor) -> PrunedTower:
    """The same pruned tower with the map folded into its projection, which it gets if it has none.

    One product of a class row more where there was no projection (C * D MACs, counted by `patchrank.macs`).
    """
    tower, config = pruned.tower, pruned.config
    state = tower.state_dict()
    weight_DC = state.get("proj.weight", torch.eye(config.width, device=map_DD.device))
    bias_D = state.get("proj.bias", torch.zeros(len(weight_DC), device=map_DD.device))
    state |= {"proj.weight": map_DD @ weight_DC, "proj.bias": map_DD @ bias_D + offset_D}
    with torch.device(map_DD.device):
        other = VisionTower(replace(config, output_dim=config.feature_dim, output_bias=True))
    other.load_state_dict(state)
    other.eval().requires_grad_(False)
    return PrunedTower(other, pruned.spec, pruned.scorer, pruned.added, pruned.metric)
