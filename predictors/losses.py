"""What a scorer is trained to do: say a golden ranking, keep the feature, or both by weight.

Golden losses see scores and golden scores (B, N), higher = keep; feature losses see pruned and dense features (B, D).
All are means over the batch, 0 or more.

Letters: B batch, N patches, D feature.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.errors import UserError
from predictors.scorers import standardise

_MARGIN = 0.5
"""Least distance of two standardised scores whose golden scores are a standard deviation apart."""


def soft_bce(score_BN: Tensor, golden_BN: Tensor) -> Tensor:
    """Binary cross-entropy of raw scores against sigmoid(z-scored golden scores).

    Source: Patch Ranking, eq. 8, read with the negative term that it lacks (as printed it has no minimum).
    """
    return F.binary_cross_entropy_with_logits(score_BN, standardise(golden_BN).sigmoid())


def listwise(score_BN: Tensor, golden_BN: Tensor) -> Tensor:
    """Cross-entropy of softmax(scores) against softmax(z-scored golden scores), less the target's own entropy.

    Source: ListNet (Cao et al. 2007), top-one form.
    """
    target_BN = standardise(golden_BN).softmax(-1)
    return F.kl_div(score_BN.log_softmax(-1), target_BN, reduction="batchmean")


def pairwise(score_BN: Tensor, golden_BN: Tensor) -> Tensor:
    """Hinge on all pairs: standardised scores should lie apart in proportion to their golden scores.

    A pair counts by the distance of its golden scores, so near ties cost nothing.
    Source: margin ranking as in RankNet's family (Burges 2010); the weight is ours.
    """
    z_BN, golden_BN = standardise(score_BN), standardise(golden_BN)
    gap_BNN = golden_BN.unsqueeze(2) - golden_BN.unsqueeze(1)
    lead_BNN = (z_BN.unsqueeze(2) - z_BN.unsqueeze(1)) * gap_BNN.sign()
    weight_BNN = gap_BNN.abs()
    loss_BNN = weight_BNN * F.relu(_MARGIN * weight_BNN - lead_BNN)
    return loss_BNN.sum() / weight_BNN.sum().clamp_min(1e-6)


def feature_distance(feature_BD: Tensor, dense_BD: Tensor) -> Tensor:
    """1 - cosine to the unpruned feature, as half the squared distance of unit vectors (exact near zero)."""
    unit_BD, target_BD = F.normalize(feature_BD.float(), dim=-1), F.normalize(dense_BD.float(), dim=-1)
    return 0.5 * (unit_BD - target_BD).square().sum(-1).mean()


def feature_error(feature_BD: Tensor, dense_BD: Tensor) -> Tensor:
    """Squared error relative to the squared length of the unpruned feature: direction and length, for heads that
    read features as they are."""
    error_B = (feature_BD.float() - dense_BD.float()).square().sum(-1)
    return 0.5 * (error_B / dense_BD.float().square().sum(-1).clamp_min(1e-12)).mean()


def answer_divergence(logits_BY: Tensor, dense_BY: Tensor) -> Tensor:
    """KL divergence in nats from the unpruned tower's answers to the pruned one's, both logits (B, Y)."""
    return F.kl_div(logits_BY.log_softmax(-1), dense_BY.log_softmax(-1), reduction="batchmean", log_target=True)


GOLDEN_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": soft_bce,
    "listwise": listwise,
    "pairwise": pairwise,
}
"""Name -> (score (B, N), golden (B, N)) -> scalar; all need a ranking store."""

FEATURE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "distill": feature_distance,
    "error": feature_error,
}
"""Name -> (pruned feature (B, D), dense feature (B, D)) -> scalar; none needs a label."""


def parse_weights(text: str) -> dict[str, float]:
    """'distill' or 'distill:1,listwise:0.1' -> weights by name.

    Raises: UserError for an unknown name, a weight that is not a positive number, or no loss at all.
    """
    known = [*FEATURE_LOSSES, *GOLDEN_LOSSES]
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, _, amount = item.strip().partition(":")
        if name not in known:
            raise UserError(f"--loss {text}: {name!r} is unknown; choose from {', '.join(known)}")
        try:
            weights[name] = float(amount or 1.0)
        except ValueError:
            raise UserError(f"--loss {text}: {amount!r} is no number; write {name}:0.5") from None
        if not 0.0 < weights[name] < float("inf"):
            raise UserError(f"--loss {text}: the weight of {name} must be positive; leave the loss out instead")
    return weights


def needs_golden(weights: Mapping[str, float]) -> bool:
    """Whether any of these losses reads golden scores."""
    return any(name in GOLDEN_LOSSES for name in weights)


def needs_feature(weights: Mapping[str, float]) -> bool:
    """Whether any of these losses reads the pruned feature."""
    return any(name in FEATURE_LOSSES for name in weights)


def combine(
    weights: Mapping[str, float],
    *,
    score_BN: Tensor,
    golden_BN: Tensor | None = None,
    feature_BD: Tensor | None = None,
    dense_BD: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the named losses and each one alone; what no named loss reads may be None."""
    terms = {name: FEATURE_LOSSES[name](feature_BD, dense_BD) for name in weights if name in FEATURE_LOSSES}
    terms |= {name: GOLDEN_LOSSES[name](score_BN, golden_BN) for name in weights if name in GOLDEN_LOSSES}
    total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return total, {name: term.detach() for name, term in terms.items()}
