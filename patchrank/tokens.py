"""Score -> keep the best k -> gather (-> fold): the one selection core, as pure functions.

Search, predictors, export, rival methods and masked pretraining all call these; there is no second top-k,
no second gather and no second count of kept tokens anywhere in the library.

Letters: B batch, N patches (or selection units), K kept, R = N - K rest, C channels, M metric channels, L tokens.
"""

import math

import torch
from torch import Tensor


def num_keep(keep: float, num_units: int) -> int:
    """Number of units that `keep` leaves of `num_units`: half rounds up, never below one.

    Args: `keep` ratio in (0, 1]; `num_units` >= 1. Returns: K in 1 .. num_units, with num_keep(K / N, N) == K.
    Raises: ValueError for a ratio outside (0, 1].
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep={keep}: must lie in (0, 1]; 0.6 keeps 60 % of the patches")
    return max(1, math.floor(keep * num_units + 0.5 + 1e-9))


def rank(score_BN: Tensor) -> Tensor:
    """Order (B, N) int64 of float scores (B, N), best first; equal scores stand in index order."""
    return torch.sort(score_BN, dim=-1, descending=True, stable=True).indices


def keep_top(score_BN: Tensor, K: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Indices (B, K) int64 of the K highest scores (B, N), best first; nested: smaller K gives a prefix.

    Equal scores stand in index order (inference), or in random order if a `generator` is given (training).
    """
    if generator is None:
        return rank(score_BN)[:, :K]
    shuffle_BN = torch.rand(score_BN.shape, generator=generator, device=score_BN.device).argsort(dim=-1)
    return shuffle_BN.gather(1, rank(score_BN.gather(1, shuffle_BN))[:, :K])


def gather_tokens(x_BNC: Tensor, index_BK: Tensor) -> Tensor:
    """Rows `index_BK` (B, K) int64 of `x_BNC` (B, N, C): (B, K, C), in the order of the index."""
    return x_BNC.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, x_BNC.shape[-1]))


def assign_to_nearest(metric_BRM: Tensor, metric_BKM: Tensor) -> Tensor:
    """For every rest token the kept token of highest cosine: (B, R) int64 in 0 .. K-1, ties to the lowest."""
    unit_BRM = torch.nn.functional.normalize(metric_BRM, dim=-1)
    unit_BKM = torch.nn.functional.normalize(metric_BKM, dim=-1)
    return (unit_BRM @ unit_BKM.mT).argmax(dim=-1)


def fold_tokens(
    kept_BKC: Tensor,
    rest_BRC: Tensor,
    assign_BR: Tensor,
    size_BK: Tensor,
    size_BR: Tensor,
    *,
    merge_norm: str = "preserve",
) -> tuple[Tensor, Tensor]:
    """Average every rest token into the kept token it is assigned to, weighted by size; a matrix product, no scatter.

    Args: kept (B, K, C) and rest (B, R, C) tokens; assign (B, R) int64 into the kept; sizes (B, K) and (B, R) float,
    the number of patches that each token stands for; merge_norm "mean" leaves the average as it is, "preserve" gives
    it the size-weighted mean norm of its members.
    Returns: folded tokens (B, K, C) and their sizes (B, K); sizes add up to what came in.
    Source: our fold; merging weights as ToMe (Bolya et al. 2023, section 3), norms as MLERP of ToFu (Kim et al. 2024).
    """
    K = kept_BKC.shape[1]
    onehot_BKR = (assign_BR.unsqueeze(1) == torch.arange(K, device=assign_BR.device).view(1, K, 1)).to(kept_BKC.dtype)
    weight_BKR = onehot_BKR * size_BR.unsqueeze(1)
    total_BK = size_BK + weight_BKR.sum(-1)
    merged_BKC = (kept_BKC * size_BK.unsqueeze(-1) + weight_BKR @ rest_BRC) / total_BK.unsqueeze(-1)
    if merge_norm == "mean":
        return merged_BKC, total_BK
    if merge_norm != "preserve":
        raise ValueError(f"merge_norm={merge_norm!r}: must be 'mean' or 'preserve'")
    norm_BK = kept_BKC.norm(dim=-1) * size_BK + (weight_BKR @ rest_BRC.norm(dim=-1, keepdim=True)).squeeze(-1)
    scale_BK = norm_BK / total_BK / merged_BKC.norm(dim=-1).clamp_min(1e-6)
    return merged_BKC * scale_BK.unsqueeze(-1), total_BK


def fold_sizes(assign_BR: Tensor, size_BK: Tensor, size_BR: Tensor) -> Tensor:
    """Sizes (B, K) after folding, for a fold whose weights are not the sizes; arguments as in `fold_tokens`."""
    K = size_BK.shape[1]
    mine_BKR = assign_BR.unsqueeze(1) == torch.arange(K, device=assign_BR.device).view(1, K, 1)
    return size_BK + (mine_BKR.to(size_BR.dtype) * size_BR.unsqueeze(1)).sum(-1)


def suppress(priority_BN: Tensor, metric_BNM: Tensor) -> Tensor:
    """Scores (B, N) of a covering selection: a patch scores low if one of higher priority looks like it.

    score_i = -max{cos(i, j) : p_j > p_i}; the patch of highest priority gets the top score 2 (above -cos <= 1).
    Equal priorities count in index order. One N x N product, a masked maximum, no sequential step, so it exports.
    Source: ours (docs/design.md, "covering"); the parallel form of farthest-point sampling.
    """
    unit_BNM = torch.nn.functional.normalize(metric_BNM, dim=-1)
    cosine_BNN = unit_BNM @ unit_BNM.mT
    index_N = torch.arange(priority_BN.shape[1], device=priority_BN.device)
    ahead_BNN = priority_BN.unsqueeze(1) > priority_BN.unsqueeze(2)
    tied_BNN = (priority_BN.unsqueeze(1) == priority_BN.unsqueeze(2)) & (index_N.view(1, -1) < index_N.view(-1, 1))
    return -cosine_BNN.masked_fill(~(ahead_BNN | tied_BNN), -2.0).amax(dim=-1)


def cover(score_BN: Tensor, metric_BNM: Tensor, size_BN: Tensor | None = None) -> Tensor:
    """Scores (B, N) of a covering selection by weight: what would be lost if a patch joined the nearest heavier one.

    With the weight w_i = exp(score_i) sqrt(size_i), the result is log w_i + log(1 - max{cos(i, j) : w_j > w_i}); the
    heaviest patch counts as unlike any other. Equal weights count in index order. Args: score (B, N) float, a log
    importance; metric (B, N, M) float; size (B, N) float, patches that each one stands for (None: one each).
    Cost and shapes as `suppress`: one N x N product, a masked maximum, no sequential step.
    Source: ours (docs/design.md, "covering"); the merging costs of Ward (1963) grow with sizes in the same way.
    """
    weight_BN = score_BN if size_BN is None else score_BN + 0.5 * size_BN.log()
    return weight_BN + (1.0 + suppress(weight_BN, metric_BNM)).clamp_min(1e-6).log()


def unfold_tokens(folded_BKC: Tensor, keep_BK: Tensor, rest_BR: Tensor, assign_BR: Tensor) -> Tensor:
    """Give every patch position its token back: kept ones their own, the rest that of their host; (B, K + R, C)."""
    source_BN = torch.cat([keep_BK, rest_BR], dim=1).argsort(dim=1)
    host_BK = torch.arange(keep_BK.shape[1], device=keep_BK.device).expand_as(keep_BK)
    return gather_tokens(folded_BKC, torch.cat([host_BK, assign_BR], dim=1).gather(1, source_BN))
