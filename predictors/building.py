"""From flags to untrained parts: the scorer and the added tokens, with what a saved tower must know to rebuild them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchrank.data import load_dataset
from patchrank.errors import UserError
from patchrank.loading import LoadedClip, class_matrix
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig, VisionTower
from predictors.config import TrainConfig
from predictors.losses import needs_feature, parse_weights
from predictors.tables import build_added, build_scorer, scorer_options

_START = 0.05
"""Scale of the first log importances: they break ties, likeness decides."""


@dataclass(frozen=True)
class Parts:
    """What training changes, and the rows of `patchrank.saving.save_pruned` that name it."""

    scorer: nn.Module
    added: nn.Module | None
    rows: dict[str, Any]

    @property
    def learned(self) -> nn.ModuleDict:
        """All trained modules as one."""
        return nn.ModuleDict({"scorer": self.scorer} | ({} if self.added is None else {"added": self.added}))


def build_parts(config: TrainConfig, clip: LoadedClip) -> Parts:
    """Scorer and added tokens with weights that depend on --seed alone. Raises: UserError."""
    tower = clip.tower
    metric_dim = _metric_dim(config, tower.config)
    options: dict[str, Any] = {"metric_dim": metric_dim} if metric_dim else {}
    options |= {"weighted": True} if config.weighted else {}
    options |= {"salient": True} if config.salient and tower.config.num_prefix > 0 else {}
    options |= {"start": _START} if config.select == "cover" else {}
    options |= {"hidden": config.hidden} if config.hidden is not None else {}
    class_DY = _classes(config, clip) if config.scorer == "text-similarity" else None
    if class_DY is not None:
        options |= {"feature_dim": class_DY.shape[0], "num_classes": class_DY.shape[1]}
    torch.manual_seed(config.seed)
    scorer = build_scorer(config.scorer, tower.config, **options)
    if class_DY is not None:
        scorer.start_from(tower, class_DY)
    rows = {"scorer": config.scorer, "scorer_options": scorer_options(tower.config, **options)}
    rows |= {"model": clip.model_name, "pretrained": clip.pretrained}
    if config.added is None:
        return Parts(scorer.to(config.device), None, rows)
    added = build_added(config.added, tower.config, num_added=config.num_added)
    rows |= {"added": config.added, "added_options": {"width": tower.config.width, "num_added": config.num_added}}
    return Parts(scorer.to(config.device), added.to(config.device), rows)


@torch.no_grad()
def start_metric(scorer: nn.Module, tower: VisionTower, spec: PruneSpec, x_BLC: torch.Tensor) -> None:
    """Let a scorer's metric begin with the strongest directions of the unpruned tokens at all cuts.

    Args: tokens (B, P + N, C) that enter the block of the first cut, of a few images.
    """
    seen = []
    for layer in range(spec.cuts[0][0], spec.cuts[-1][0] + 1):
        attended_BLC = tower.blocks[layer].attend(x_BLC)[0]
        if layer in dict(spec.cuts):
            seen.append((x_BLC if spec.where == "before" else attended_BLC)[:, tower.config.num_prefix :])
        x_BLC = tower.blocks[layer].mlp(attended_BLC)
    scorer.start_from_tokens(torch.cat(seen))


def _metric_dim(config: TrainConfig, tower_config: TowerConfig) -> int:
    if config.metric_dim is not None:
        return config.metric_dim
    matters = config.rest == "fold" or config.select != "topk"
    trained = needs_feature(parse_weights(config.loss))
    return max(4, 3 * tower_config.width // tower_config.num_heads // 8) if matters and trained else 0


def _classes(config: TrainConfig, clip: LoadedClip) -> torch.Tensor:
    """Class directions (D, Y) of the training data's classes. Raises: UserError where there are none."""
    dataset = load_dataset(config.data, root=config.data_root, split=config.split)
    try:
        return class_matrix(clip, dataset)[0].to("cpu")
    except UserError as error:
        raise UserError(f"--scorer text-similarity: needs class names and a model that knows them: {error}") from error
