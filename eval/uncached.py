"""What greedy m = 1 costs when nothing is shared: MACs in closed form, seconds from rounds at some lengths.

Uncached means what the published method does: every candidate runs from the pixels, the last block in full. A round of
length A tries the A removals of A patches, so K = A - 1 stay.

Letters: A patches alive, N patches, K kept, V candidates, D feature, C colours, H and W pixels.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from patchrank.macs import pruned_macs
from patchrank.pruned import PrunedTower, size_with_prefix
from patchrank.search.criteria import Damage
from patchrank.search.greedy import removals
from patchrank.search.variants import Variants, prefix_macs, variant_macs
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig, VisionTower

STRIDE = 16


def uncached_macs(config: TowerConfig, spec: PruneSpec) -> int:
    """All candidates of all rounds, each from the pixels, the last block in full."""
    N = config.num_patches
    return sum(A * pruned_macs(config, spec.with_keep((A - 1) / N), class_row_only=False) for A in range(N, 1, -1))


def cached_macs(tower: VisionTower, spec: PruneSpec) -> int:
    """The prefix once, then all candidates of all rounds behind it, without the padding of chunks."""
    N = tower.config.num_patches
    return prefix_macs(tower, spec) + sum(A * variant_macs(tower, spec, N, A - 1) for A in range(N, 1, -1))


def lengths(num_patches: int, stride: int = STRIDE) -> list[int]:
    """Every `stride`-th length A from N down to 2 or a little more."""
    return list(range(num_patches, 1, -stride))


def alive_mask(order_N: Tensor, num_alive: int) -> Tensor:
    """The patches (N,) bool that an elimination by this order, best first, has left at this length."""
    alive_N = torch.zeros(len(order_N), dtype=torch.bool)
    alive_N[order_N[:num_alive].long()] = True
    return alive_N


def in_full(pruned: PrunedTower, image_VCHW: Tensor, score_VN: Tensor) -> Tensor:
    """Features (V, D) of a pruned tower whose cut follows these scores, all rows of the last block computed."""
    state, _ = pruned.tokens(image_VCHW, score_VN)
    return pruned.tower.head(state.x_BLC, size_with_prefix(state), state.num_prefix)


def uncached_features(tower: VisionTower, image_CHW: Tensor, spec: PruneSpec, mask_VN: Tensor, chunk: int) -> Tensor:
    """Features (V, D) of keep masks (V, N) with equal counts, each variant computed from the pixels in full."""
    pruned = PrunedTower(tower, spec.with_keep(int(mask_VN[0].sum()) / mask_VN.shape[1]), None)
    parts = mask_VN.float().split(chunk)
    return torch.cat([in_full(pruned, image_CHW.expand(len(part_VN), -1, -1, -1), part_VN) for part_VN in parts])


def uncached_round(
    variants: Variants, image_CHW: Tensor, damage: Damage, order_N: Tensor, num_alive: int
) -> Callable[[], Tensor]:
    """One round that shares nothing, ready to be called and timed; damages (A,)."""
    _, mask_AN = removals(alive_mask(order_N, num_alive).to(image_CHW.device))
    return lambda: damage(uncached_features(variants.tower, image_CHW, variants.spec, mask_AN, variants.chunk))


def cached_round(variants: Variants, damage: Damage, order_N: Tensor, num_alive: int) -> Callable[[], Tensor]:
    """One round of the cached search, ready to be called and timed; damages (A,)."""
    _, mask_AN = removals(alive_mask(order_N, num_alive).to(variants.state.x_BLC.device))
    return lambda: damage(variants.features(mask_AN))


def timed(call: Callable[[], object], device: str) -> tuple[object, float]:
    """What the call returns, and the seconds it took, the device's queue emptied on both sides."""
    _synchronise(device)
    start = time.perf_counter()
    value = call()
    _synchronise(device)
    return value, time.perf_counter() - start


def _synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def integrate(seconds: dict[int, float], num_patches: int, chunk: int = 1) -> float:
    """Seconds of all rounds N .. 2 from those of some lengths: seconds per computed row, linear between lengths.

    Args: seconds by length A; chunk: rows are computed in full chunks of this many (1: none is padded). A round that
    fits into one chunk is not padded, as in `Variants.features`.
    """
    known = sorted(seconds)
    per_row = [seconds[A] / rows(A, chunk) for A in known]
    every = np.arange(2, num_patches + 1)
    return float(sum(np.interp(every, known, per_row) * [rows(int(A), chunk) for A in every]))


def rows(num_alive: int, chunk: int) -> int:
    """Rows that a round of this length computes, padding included."""
    return num_alive if num_alive <= chunk else -(-num_alive // chunk) * chunk
