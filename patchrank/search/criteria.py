"""What "hurts" means: three criteria, each a damage >= 0 of a pruned feature; the negation of the paper's score.

A patch whose removal does much damage gets a high score, so higher = keep holds from here on.

Letters: V variants (pruned features of one image), D feature, Y classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.errors import UserError

Damage = Callable[[Tensor], Tensor]
"""Pruned features (V, D) -> damage (V,) float32, lower = harmless."""


@dataclass(frozen=True)
class Target:
    """What one image's variants are judged against."""

    dense_D: Tensor
    """Feature of the unpruned tower."""
    logits: Callable[[Tensor], Tensor] | None = None
    """(V, D) -> (V, Y) logits of the zero-shot classifier or the model's own head."""
    label: int | None = None


def _not_posterior(logits_VY: Tensor, class_V: Tensor) -> Tensor:
    """1 - posterior of one class as the sum of all others, so it stays exact where the posterior is almost 1."""
    return logits_VY.float().softmax(-1).scatter(1, class_V.unsqueeze(1), 0.0).sum(-1)


def _logits(target: Target, criterion: str) -> Callable[[Tensor], Tensor]:
    if target.logits is None:
        raise UserError(f"--criterion {criterion}: needs class names, this data set has none; use preservation")
    return target.logits


def label(target: Target) -> Damage:
    """1 - posterior of the true class: an oracle, since it reads the answer.

    Source: Patch Ranking, section 3.1, "label-driven"; posteriors (the published code takes logits).
    """
    logits = _logits(target, "label")
    if target.label is None:
        raise UserError("--criterion label: this data set has no labels; use preservation")
    return lambda feature_VD: _not_posterior(logits(feature_VD), _repeat(target.label, feature_VD))


def _repeat(value: int, feature_VD: Tensor) -> Tensor:
    return torch.full((feature_VD.shape[0],), value, dtype=torch.int64, device=feature_VD.device)


def confidence(target: Target) -> Damage:
    """1 - largest posterior, the class chosen anew for every variant.

    Source: Patch Ranking, section 3.1, "maximum confidence" (the published code follows the first variant's class).
    """
    logits = _logits(target, "confidence")

    def damage(feature_VD: Tensor) -> Tensor:
        logits_VY = logits(feature_VD)
        return _not_posterior(logits_VY, logits_VY.argmax(-1))

    return damage


def preservation(target: Target) -> Damage:
    """1 - cosine to the unpruned feature, as half the squared distance of unit vectors (exact near zero).

    Source: Patch Ranking, section 3.1, "feature preservation".
    """
    unit_D = F.normalize(target.dense_D.float(), dim=-1)
    return lambda feature_VD: 0.5 * (F.normalize(feature_VD.float(), dim=-1) - unit_D).square().sum(-1)


CRITERIA: dict[str, Callable[[Target], Damage]] = {
    "preservation": preservation,
    "confidence": confidence,
    "label": label,
}


def build_damage(criterion: str, target: Target) -> Damage:
    """The damage function of a criterion by name. Raises: UserError for an unknown name."""
    if criterion not in CRITERIA:
        raise UserError(f"--criterion {criterion}: unknown; choose one of {', '.join(CRITERIA)}")
    return CRITERIA[criterion](target)
