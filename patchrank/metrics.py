"""Numbers that reports are made of, as pure functions: accuracy, recall, curves, rank agreement, bootstrap intervals.

Fractions in [0, 1] throughout; percent is for print.

Letters: B samples, Y classes, Q queries, G gallery, M points or columns, I images, R resamples, N patches.
"""

from functools import lru_cache

import torch
from scipy.stats import kendalltau
from torch import Tensor

NUM_RESAMPLES = 2000
LEVEL = 0.95


def accuracy(logits_BY: Tensor, label_B: Tensor, k: int = 1) -> float:
    """Share of samples whose label is among the `k` highest logits (B, Y); ties fall to the lowest class.

    Raises: ValueError for no samples or k outside 1 .. Y.
    """
    if not 1 <= k <= logits_BY.shape[1]:
        raise ValueError(f"k={k}: must be 1 to {logits_BY.shape[1]}, the number of classes")
    if not len(label_B):
        raise ValueError("accuracy of no samples is undefined; give at least one")
    top_Bk = torch.sort(logits_BY, dim=1, descending=True, stable=True).indices[:, :k]
    return (top_Bk == label_B.unsqueeze(1)).any(1).double().mean().item()


def mean_per_class(predicted_B: Tensor, label_B: Tensor) -> float:
    """Mean over the classes present in `label_B` of the share of their samples that are predicted right (int64 both).

    Raises: ValueError for no samples.
    """
    if not len(label_B):
        raise ValueError("mean per class of no samples is undefined; give at least one")
    num_B = torch.bincount(label_B).double()
    hits_Y = torch.bincount(label_B, weights=(predicted_B == label_B).double(), minlength=len(num_B))
    return (hits_Y[num_B > 0] / num_B[num_B > 0]).mean().item()


def recall_at_k(similarity_QG: Tensor, match_QG: Tensor, k: int) -> float:
    """Share of queries with at least one match (Q, G) bool among the `k` most similar; ties fall to the lowest index.

    Raises: ValueError for no queries or k outside 1 .. G.
    """
    num_queries, num_gallery = similarity_QG.shape
    if not 1 <= k <= num_gallery:
        raise ValueError(f"k={k}: must be 1 to {num_gallery}, the size of the gallery")
    if not num_queries:
        raise ValueError("recall of no queries is undefined; give at least one")
    top_Qk = torch.sort(similarity_QG, dim=1, descending=True, stable=True).indices[:, :k]
    return match_QG.gather(1, top_Qk).any(1).double().mean().item()


def curve_mean(at_M: Tensor, value_M: Tensor) -> Tensor:
    """Area under a curve over its width, by trapezoids: the mean of values (..., M) at rising points (M,).

    Raises: ValueError for fewer than two points or points that do not rise.
    """
    if at_M.ndim != 1 or len(at_M) < 2 or not (at_M.diff() > 0).all():
        raise ValueError(f"points {at_M.tolist()}: must be two or more and rise")
    return torch.trapezoid(value_M.double(), at_M.double(), dim=-1) / (at_M[-1] - at_M[0]).double()


def kendall_tau(order_N: Tensor, other_N: Tensor) -> float:
    """Kendall's tau in [-1, 1] of two orders (permutations (N,) of 0 .. N-1, N >= 2), compared by rank."""
    rank_N, other_rank_N = order_N.long().argsort(), other_N.long().argsort()
    return float(kendalltau(rank_N.cpu().numpy(), other_rank_N.cpu().numpy()).statistic)


def resampled_means(value_IM: Tensor, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Tensor:
    """Bootstrap means (R, M) float64 of columns (I, M) over images drawn with replacement.

    All columns share each draw, so differences and ratios of columns are paired by image.
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    Raises: ValueError for no images.
    """
    num_images = len(value_IM)
    if not num_images:
        raise ValueError("a bootstrap over no images is undefined; give at least one")
    return _times_drawn(num_images, num_resamples, seed) @ value_IM.double() / num_images


@lru_cache(maxsize=8)
def _times_drawn(num_images: int, num_resamples: int, seed: int) -> Tensor:
    """How often each draw takes each image, (R, I) float64; tables of many intervals draw once a data set."""
    generator = torch.Generator().manual_seed(seed)
    drawn_RI = torch.randint(num_images, (num_resamples, num_images), generator=generator)
    count_RI = torch.zeros(num_resamples, num_images, dtype=torch.float64)
    return count_RI.scatter_add_(1, drawn_RI, torch.ones_like(count_RI))


def interval(value_R: Tensor, level: float = LEVEL) -> tuple[float, float]:
    """Central percentile interval of bootstrap values (R,)."""
    tail = (1 - level) / 2
    low, high = torch.quantile(value_R.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def paired_interval(value_I: Tensor, other_I: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of mean(value - other) over the same images (I,)."""
    difference_I1 = (value_I.double() - other_I.double()).unsqueeze(1)
    return interval(resampled_means(difference_I1, seed=seed)[:, 0])
