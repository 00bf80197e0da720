"""How sure a pruned tower's answers are: one factor on its logits, fitted without labels, and the calibration error.

The factor changes no answer. For a CLIP it multiplies the logit scale, for a classifier the head's rows and bias.

Letters: n images, Y classes.
"""

import torch
from torch import Tensor

from patchrank.pruned import PrunedTower
from predictors.cache import first
from predictors.judging import pruned_features
from predictors.prepare import Images

_BINS = 15
_RANGE, _HALVINGS = (0.01, 100.0), 60


def refit_factor(logit_nY: Tensor, dense_nY: Tensor) -> float:
    """The factor in [0.01, 100] that brings softmax(factor * logits) nearest to the unpruned softmax.

    Nearest in the mean KL from the unpruned to the pruned, which is convex in the factor: its slope is halved upon.
    Args: logits (n, Y) of the pruned and of the unpruned tower. No labels are read.
    Source: temperature scaling (Guo et al. 2017, section 4.2), with the unpruned answers in place of labels.
    """
    logit_nY, target_nY = logit_nY.double(), dense_nY.double().softmax(-1)
    wanted = (target_nY * logit_nY).sum(-1).mean()
    low, high = _RANGE
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        rising = (((middle * logit_nY).softmax(-1) * logit_nY).sum(-1).mean() - wanted) > 0
        low, high = (low, middle) if rising else (middle, high)
    return (low * high) ** 0.5


def calibration_error(logit_nY: Tensor, label_n: Tensor, num_bins: int = _BINS) -> float:
    """Expected calibration error in [0, 1]: distance of confidence and accuracy, mean over bins of equal width.

    Args: logits (n, Y), labels (n,) int64, n >= 1. Source: Guo et al. 2017, section 2, 15 bins.
    """
    confidence_n, answer_n = logit_nY.double().softmax(-1).max(-1)
    bin_n = (confidence_n * num_bins).ceil().long().clamp(1, num_bins) - 1
    gap_n = (answer_n == label_n.to(answer_n.device)).double() - confidence_n
    return (torch.zeros(num_bins).to(gap_n).index_add(0, bin_n, gap_n).abs().sum() / len(gap_n)).item()


@torch.no_grad()
def confidence(pruned: PrunedTower, held_out_nD: Tensor, images: Images) -> dict[str, float]:
    """The factor, fitted on as many train images as are held out, and calibration errors on those held out.

    Args: held_out_nD: features of `pruned` of the held-out images.

    Errors where labels are known: of the unpruned tower, of the pruned one, and of that with the factor. {} for images
    that have no classes.
    """
    if images.classify is None:
        return {}
    few, tokens, classify = first(images.train, len(images.held_out)), images.held_out, images.classify
    feature_nD = pruned_features(pruned, few, pruned.spec.cuts[0][0])
    factor = refit_factor(classify(feature_nD), classify(few.feature_nD))
    found = {"logit_factor": factor, "num_fitted": len(few)}
    known_n = tokens.label_n >= 0
    if known_n.any():
        label_n, logit_nY = tokens.label_n[known_n], classify(held_out_nD[known_n])
        found |= {
            "ece_dense": calibration_error(classify(tokens.feature_nD[known_n]), label_n),
            "ece": calibration_error(logit_nY, label_n),
            "ece_refitted": calibration_error(factor * logit_nY, label_n),
        }
    return found


def said(found: dict[str, float]) -> str:
    """One line for the terminal."""
    text = f"logit factor {found['logit_factor']:.3f}, fitted without labels on {found['num_fitted']} train images"
    if "ece" in found:
        dense, before, after = (100 * found[name] for name in ("ece_dense", "ece", "ece_refitted"))
        text += f"; calibration error {before:.1f} -> {after:.1f} % (unpruned {dense:.1f} %)"
    return text
