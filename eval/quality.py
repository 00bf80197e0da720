"""What an order is worth on an image, and what a strategy is worth over images: recovered headroom.

quality = (AUC - AUC_free) / (AUC_exact - AUC_free), AUC = mean cosine to the unpruned feature over keep 0.30 .. 0.70.

Letters: S rankings, R orders (draws) of one ranking, M keep ratios, I images, N patches, D feature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchrank import metrics
from patchrank.search.curves import features_along, preserved
from patchrank.search.runner import Job
from patchrank.search.variants import Variants
from patchrank.tokens import num_keep

AUC_KEEPS = tuple(round(0.30 + 0.05 * step, 2) for step in range(9))
ACC_KEEPS = (0.8, 0.6, 0.4)
CURVE_KEEPS = (0.1, 0.2, *AUC_KEEPS, 0.8, 0.9)


@dataclass(frozen=True)
class Worth:
    """One ranking on one image, mean over its draws."""

    cosine_M: list[float]
    hit_M: list[float] | None
    """Share of draws with the right answer; None without classes or label."""


def judge(job: Job, variants: Variants, label: int | None, order_RN: Tensor, keeps: tuple[float, ...]) -> Worth:
    """Keep the first K of every order at every ratio, under the job's `rest`."""
    counts = [num_keep(keep, variants.num_patches) for keep in keeps]
    feature_RMD = features_along(variants, order_RN.to(variants.dense_D.device), counts)
    cosine_M = preserved(feature_RMD, variants.dense_D).double().mean(0).tolist()
    if job.logits is None or label is None:
        return Worth(cosine_M, None)
    hit_RM = (job.logits(feature_RMD.flatten(0, 1)).argmax(-1) == label).view(feature_RMD.shape[:2])
    return Worth(cosine_M, hit_RM.double().mean(0).tolist())


def dense_hit(job: Job, variants: Variants, label: int | None) -> float | None:
    """1.0 if the unpruned tower answers right, 0.0 if not; None without classes or label."""
    if job.logits is None or label is None:
        return None
    return float(job.logits(variants.dense_D[None]).argmax(-1).item() == label)


def auc(cosine_IM: Tensor) -> Tensor:
    """Area under the curve (I,) over `AUC_KEEPS`, of cosines (I, M) at `CURVE_KEEPS`."""
    at = [CURVE_KEEPS.index(keep) for keep in AUC_KEEPS]
    return metrics.curve_mean(torch.tensor(AUC_KEEPS), cosine_IM[:, at])


@dataclass(frozen=True)
class Quality:
    """Means over the images and their 95 % bootstrap intervals, paired by image."""

    auc: float
    auc_interval: tuple[float, float]
    quality: float | None
    quality_interval: tuple[float, float] | None


def recovered_headroom(auc_I: Tensor, free_I: Tensor, exact_I: Tensor) -> Quality:
    """Quality of a ranking by its AUC, that of the best free scorer and that of exact greedy on the same images (I,).

    None where exact greedy is not better than free (no headroom); resamples without headroom are left out of the
    interval.
    """
    mean_R3 = metrics.resampled_means(torch.stack([auc_I, free_I, exact_I], dim=1))
    value, free, exact = (column.double().mean().item() for column in (auc_I, free_I, exact_I))
    auc_interval = metrics.interval(mean_R3[:, 0])
    if exact <= free:
        return Quality(value, auc_interval, None, None)
    room_R = mean_R3[:, 2] - mean_R3[:, 1]
    quality_R = ((mean_R3[:, 0] - mean_R3[:, 1]) / room_R)[room_R > 0]
    return Quality(value, auc_interval, (value - free) / (exact - free), metrics.interval(quality_R))


def best_free(auc_SI: dict[str, Tensor]) -> str:
    """Name of the free scorer with the highest mean AUC; ties fall to the first."""
    return max(auc_SI, key=lambda name: auc_SI[name].mean().item())
