"""A golden ranking of one image: what every strategy returns and the store keeps."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranking:
    """One image's patches in order of importance.

    order (N,) int16: permutation, order[0] = most important; score (N,) float32: higher = keep, by position;
    trace (N,) float32: damage when that position was taken away (greedy), or the strategy's raw estimate.
    """

    order_N: Tensor
    score_N: Tensor
    trace_N: Tensor


def ranking_from_score(score_N: Tensor, trace_N: Tensor | None = None) -> Ranking:
    """Ranking by a score (N,), higher = keep; ties fall to the lowest index."""
    score_N = score_N.float().cpu()
    order_N = torch.sort(score_N, descending=True, stable=True).indices.to(torch.int16)
    return Ranking(order_N, score_N, score_N.clone() if trace_N is None else trace_N.float().cpu())


def ranking_from_order(order: list[int], trace_N: Tensor | None = None) -> Ranking:
    """Ranking by position: score = (N - 1 - rank) / (N - 1)."""
    num_patches = len(order)
    order_N = torch.tensor(order, dtype=torch.int64)
    score_N = torch.empty(num_patches)
    score_N[order_N] = torch.arange(num_patches - 1, -1, -1, dtype=torch.float32) / max(1, num_patches - 1)
    return Ranking(order_N.to(torch.int16), score_N, score_N.clone() if trace_N is None else trace_N.float().cpu())


def ranking_from_removal(removed: list[int], values: list[float], num_patches: int) -> Ranking:
    """Ranking from an elimination: `removed` first to last with the damage at removal; the survivor comes first."""
    survivors = sorted(set(range(num_patches)) - set(removed))
    trace_N = torch.full((num_patches,), values[-1] if values else 0.0)
    trace_N[torch.tensor(removed, dtype=torch.int64)] = torch.tensor(values)
    return ranking_from_order(survivors + removed[::-1], trace_N)
