"""Rows that are a `PrunedTower`: one cut that drops, one cut that folds into farthest points, and our two presets.

Letters: B batch, N patches present, K kept, M metric channels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.rivals.budget import Rival, nearest_setting
from patchrank.errors import UserError
from patchrank.macs import pruned_macs
from patchrank.presets import default_layer, low_latency, spec_for_macs
from patchrank.pruned import Cut, PrunedTower, State, apply_cut, fold_metric
from patchrank.scorers import SCORERS
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig, VisionTower


class Pruned(Rival):
    """A `PrunedTower` and its MACs; `extra`: what its selection costs beside what the spec says."""

    def __init__(self, pruned: PrunedTower, extra: int = 0) -> None:
        super().__init__(pruned.tower, pruned_macs(pruned.config, pruned.spec, scorer=extra))
        self.pruned = pruned

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.pruned(image_BCHW)


def _one_cut(config: TowerConfig, macs: float, rest: str, extra: int) -> PruneSpec:
    """One cut before a quarter of the depth at a budget."""

    def spec(K: int) -> PruneSpec:
        return PruneSpec(cuts=((default_layer(config.num_layers), K / config.num_patches),), rest=rest, select="topk")

    cost = lambda K: pruned_macs(config, spec(K), scorer=extra)  # noqa: E731
    return spec(nearest_setting(config, macs, cost, config.num_patches))


def _scorer_macs(config: TowerConfig, scorer: str) -> int:
    """What a scorer of `SCORERS` computes before block `layer` of an unpruned tower."""
    if scorer != "class-attention":
        return 0
    tokens = config.num_prefix + config.num_patches
    return config.width * config.width * (1 + tokens) + config.width * tokens


def drop(tower: VisionTower, macs: float, *, scorer: str, seed: int = 0) -> Pruned:
    """One cut that keeps the best patches of a training-free scorer and drops the others.

    Raises: UserError for class attention without a class token, or a budget out of reach.
    """
    config = tower.config
    if scorer == "class-attention" and config.num_prefix == 0:
        raise UserError("drop-class-attention: needs a class token, which this tower has not")
    extra = _scorer_macs(config, scorer)
    spec = _one_cut(config, macs, "drop", extra)
    return Pruned(PrunedTower(tower, spec, SCORERS[scorer](config.grid, seed)), extra)


def farthest_points(metric_BNM: Tensor, K: int) -> Tensor:
    """Order (B, N) int64: K patches by farthest-point sampling on cosine, then the others in index order.

    The first point is the patch least like the mean; each next one is least like all points so far.
    Source: Gonzalez 1985; K sequential steps, which is why it is a rival and not our selection.
    """
    unit_BNM = F.normalize(metric_BNM, dim=-1)
    cosine_BNN = unit_BNM @ unit_BNM.mT
    nearest_BN = (unit_BNM * unit_BNM.mean(dim=1, keepdim=True)).sum(-1)
    rank_BN = torch.full(nearest_BN.shape, K, dtype=torch.int64, device=nearest_BN.device)
    for place in range(K):
        taken_B1 = nearest_BN.masked_fill(rank_BN < K, torch.inf).argmin(dim=1, keepdim=True)
        rank_BN.scatter_(1, taken_B1, place)
        similarity_BN = cosine_BNN.gather(1, taken_B1.unsqueeze(-1).expand(-1, -1, cosine_BNN.shape[-1])).squeeze(1)
        nearest_BN = similarity_BN if place == 0 else torch.maximum(nearest_BN, similarity_BN)
    return torch.sort(rank_BN, dim=1, stable=True).indices


class FarthestPoint(PrunedTower):
    """A pruned tower whose kept patches are farthest points by the fold metric; no scorer is asked."""

    def cut(self, state: State, K: int, metric_BNM: Tensor | None, score_BN: Tensor | None = None) -> tuple[State, Cut]:
        """As `PrunedTower.cut`, with farthest points as the order."""
        metric_BNM = fold_metric(state) if metric_BNM is None else metric_BNM
        return apply_cut(state, farthest_points(metric_BNM, K), K, self.spec, metric_BNM)


def farthest_fold(tower: VisionTower, macs: float) -> Pruned:
    """One cut that keeps farthest points and folds the others into them."""
    config = tower.config
    extra = config.num_patches**2 * (config.width // config.num_heads)
    spec = _one_cut(config, macs, "fold", extra)
    return Pruned(FarthestPoint(tower, spec, lambda state: state.patches_BNC[..., 0]), extra)


def ours(tower: VisionTower, macs: float, *, preset: Callable[..., PruneSpec] = spec_for_macs, seed: int = 0) -> Pruned:
    """What `patchrank.apply(model, macs=...)` does: the `accurate` preset, random priorities."""
    config = tower.config
    return Pruned(PrunedTower(tower, preset(config, macs), SCORERS["random"](config.grid, seed)))


def ours_low_latency(tower: VisionTower, macs: float, *, seed: int = 0) -> Pruned:
    """The `low-latency` preset: one cut."""
    return ours(tower, macs, preset=low_latency, seed=seed)
