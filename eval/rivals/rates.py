"""The search behind the `diffrate` row: rates per block by label-free feature cosine on a few train images."""

import math

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.rivals.diffrate import Schedule, equal, with_schedule
from patchrank.tower import VisionTower
from predictors.judging import cosines

_STRIDE = 0.5
"""First step of a mutation: standard deviation of the log of a block's log ratio, and of its merged share."""


@torch.no_grad()
def cosine_of(tower: VisionTower, macs: float, schedule: Schedule, x_nLC: Tensor, dense_nD: Tensor) -> float:
    """Mean cosine to the dense feature at a budget, on tokens (n, P + N, C) that enter block 0."""
    rival = with_schedule(tower, macs, schedule)
    features = [rival.forward_from(part_BLC) for part_BLC in x_nLC.split(16)]
    return cosines(torch.cat(features), dense_nD).mean().item()


def mutated(schedule: Schedule, rng: np.random.Generator, stride: float) -> Schedule:
    """A schedule with some blocks' rates changed; ratios stay in (0, 1), shares in [0, 1]."""
    touched = rng.random(len(schedule.keep)) < 0.4
    touched[rng.integers(len(touched))] = True
    removed = np.log(-np.log(np.array(schedule.keep))) + touched * rng.normal(0, stride, len(touched))
    merged = np.clip(np.array(schedule.merged) + touched * rng.normal(0, stride, len(touched)), 0, 1)
    return Schedule(tuple(np.exp(-np.exp(np.clip(removed, -8, 1))).tolist()), tuple(merged.tolist()))


def search(
    tower: VisionTower, macs: float, x_nLC: Tensor, dense_nD: Tensor, *, num_steps: int, seed: int, quiet: bool = True
) -> tuple[Schedule, list[float]]:
    """The best schedule of `num_steps` mutations, each of the best so far, from equal rates; and every best cosine.

    Source: (1+1) evolution strategy with the one-fifth rule (Rechenberg 1973).
    """
    rng, best = np.random.default_rng(seed), equal(tower.config)
    values, stride = [cosine_of(tower, macs, best, x_nLC, dense_nD)], _STRIDE
    for _ in tqdm(range(num_steps), unit=" schedules", desc="search", disable=quiet):
        candidate = mutated(best, rng, stride)
        value = cosine_of(tower, macs, candidate, x_nLC, dense_nD)
        better = value > values[-1]
        best = candidate if better else best
        stride = float(np.clip(stride * math.exp(0.2 if better else -0.05), 0.05, 1.0))
        values.append(max(value, values[-1]))
    return best, values
