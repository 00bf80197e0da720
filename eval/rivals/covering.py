"""Rows that are a `PrunedTower`: one cut by a scorer or by farthest points, drop or fold, and our two presets.

Letters: B batch, N patches present, K kept, M metric channels.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.rivals.budget import Rival, class_token, nearest_setting
from patchrank.checkpoints.weights import weights_hash
from patchrank.macs import pruned_macs
from patchrank.presets import default_layer, low_latency, spec_for_macs
from patchrank.pruned import Cut, PrunedTower, Scorer, State, apply_cut, fold_metric
from patchrank.salient import SALIENT, Salient, default_scorer, salient_preset, share_macs
from patchrank.scorers import SCORERS, PositionPrior, mean_rank_prior
from patchrank.search.store import RankingMismatch, open_store
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig, VisionTower


class Pruned(Rival):
    """A `PrunedTower` and its MACs; `extra`: what its selection costs beside what the spec says."""

    def __init__(self, pruned: PrunedTower, extra: int = 0) -> None:
        super().__init__(pruned.tower, pruned_macs(pruned.config, pruned.spec, scorer=extra))
        self.pruned = pruned

    @property
    def first_layer(self) -> int | None:
        return min((layer for layer, _ in self.pruned.spec.cuts), default=None)

    def forward_from(self, x_BLC: Tensor, layer: int = 0) -> Tensor:
        return self.pruned.forward_from(x_BLC, layer)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.pruned(image_BCHW)


def one_cut(config: TowerConfig, macs: float, rest: str, extra: int = 0) -> PruneSpec:
    """One cut before a quarter of the depth at a budget; `extra` MACs go to the selection.

    Raises: UserError for a budget out of reach.
    """

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


def cut_by(tower: VisionTower, macs: float, *, scorer: str, rest: str, seed: int = 0) -> Pruned:
    """One cut that keeps the best patches of a training-free scorer and drops or folds the others.

    Raises: UserError for class attention without a class token, or a budget out of reach.
    """
    config = tower.config
    if scorer == "class-attention":
        class_token(tower, f"{rest}-class-attention")
    extra = _scorer_macs(config, scorer)
    spec = one_cut(config, macs, rest, extra)
    return Pruned(PrunedTower(tower, spec, SCORERS[scorer](config.grid, seed)), extra)


def mean_rank(path: Path, tower: VisionTower) -> Scorer:
    """The mean golden rank of every position over a store's images.

    Raises: RankingMismatch for a store of other weights, another layer or grid, or of images that are judged on.
    """
    config = tower.config
    store = open_store(path, weights_hash=weights_hash(tower), layer=default_layer(config.num_layers))
    if store.request["split"] != "train":
        raise RankingMismatch(
            f"{path}: ranks the split {store.request['split']}; a prior must not see images that it is judged on, "
            "search the train split"
        )
    return PositionPrior(mean_rank_prior(store.order_BN))


def mean_rank_cut(tower: VisionTower, macs: float, path: Path, *, rest: str) -> Pruned:
    """One cut by the mean golden rank of the position. Raises: UserError as `mean_rank`, or out of reach."""
    return Pruned(PrunedTower(tower, one_cut(tower.config, macs, rest), mean_rank(path, tower)))


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


def farthest(tower: VisionTower, macs: float, *, rest: str) -> Pruned:
    """One cut that keeps farthest points and drops the others or folds them in. Raises: UserError if out of reach."""
    config = tower.config
    extra = config.num_patches**2 * (config.width // config.num_heads)
    if rest == "drop":  # under fold the spec's own cost counts the keys
        extra += (config.num_prefix + config.num_patches) * config.width**2
    spec = one_cut(config, macs, rest, extra)
    return Pruned(FarthestPoint(tower, spec, lambda state: state.patches_BNC[..., 0]), extra)


def ours(
    tower: VisionTower,
    macs: float,
    *,
    preset: Callable[..., PruneSpec] = spec_for_macs,
    rest: str = "fold",
    seed: int = 0,
) -> Pruned:
    """What `patchrank.apply(model, macs=...)` does: the `accurate` preset, weighed by the class token's attention."""
    config = tower.config
    if default_scorer(config) != SALIENT:
        return ours_random(tower, macs, preset=preset, rest=rest, seed=seed)
    spec = salient_preset(preset, config, macs, rest=rest)
    return Pruned(PrunedTower(tower, spec, Salient()), share_macs(config, spec))


def ours_random(
    tower: VisionTower,
    macs: float,
    *,
    preset: Callable[..., PruneSpec] = spec_for_macs,
    rest: str = "fold",
    seed: int = 0,
) -> Pruned:
    """The `accurate` preset with random priorities, as `patchrank.apply` does on towers without a class token."""
    config = tower.config
    return Pruned(PrunedTower(tower, preset(config, macs, rest=rest), SCORERS["random"](config.grid, seed)))


def ours_low_latency(tower: VisionTower, macs: float, *, seed: int = 0) -> Pruned:
    """The `low-latency` preset: one cut."""
    return ours(tower, macs, preset=low_latency, seed=seed)
