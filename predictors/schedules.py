"""From one spec to the same spec at other keep rates: what training draws, so that one model serves a range."""

import math
from dataclasses import replace

import torch

from patchrank.errors import UserError
from patchrank.presets import Cost, check_macs
from patchrank.pretrain.draws import generator
from patchrank.spec import PruneSpec
from patchrank.tokens import num_keep
from patchrank.tower import TowerConfig

_STEPS = 10_000
"""Resolution of the share of patches behind the last cut."""


def at_power(spec: PruneSpec, power: float, num_patches: int) -> PruneSpec:
    """The same cuts with every keep ratio raised to a power: cuts of equal ratios stay cuts of equal ratios."""
    counts = [num_keep(keep**power, num_patches) for _, keep in spec.cuts]
    return replace(spec, cuts=tuple((layer, num / num_patches) for (layer, _), num in zip(spec.cuts, counts)))


def at_keep(spec: PruneSpec, K: int, num_patches: int) -> PruneSpec:
    """The same cuts with K patches left after the last; cuts of equal ratios stay cuts of equal ratios.

    Every keep ratio is raised to the power that brings the last to K / N. A cut that would remove nothing stays.
    """
    last = spec.cuts[-1][1]
    power = math.log(K / num_patches) / math.log(last) if last < 1.0 else 1.0
    counts = [max(K, num_keep(keep**power, num_patches)) for _, keep in spec.cuts[:-1]] + [K]
    return replace(spec, cuts=tuple((layer, num / num_patches) for (layer, _), num in zip(spec.cuts, counts)))


def within(spec: PruneSpec, macs: float, tower_config: TowerConfig, cost: Cost) -> PruneSpec:
    """The same cuts with the most patches whose cost is at most `macs` of the dense tower's.

    Counts of several cuts change one at a time, so a budget is met more closely than whole patches at the last would.
    Raises: UserError for a share outside (0, 1] or one that these cuts cannot reach.
    """
    check_macs(macs)
    last, num_patches, budget = (
        spec.cuts[-1][1],
        tower_config.num_patches,
        macs * cost(tower_config, PruneSpec(cuts=())),
    )

    def at_share(step: int) -> PruneSpec:
        share = step / _STEPS
        return at_power(spec, math.log(share) / math.log(last) if last < 1.0 else 1.0, num_patches)

    low, high = 1, _STEPS - 1
    if cost(tower_config, at_share(low)) > budget:
        raise UserError(f"--macs {macs:g}: these cuts cannot save that much; choose a higher value")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(tower_config, at_share(middle)) <= budget else (low, middle - 1)
    return at_share(low)


def check_range(keep_range: tuple[float, float], num_patches: int) -> tuple[int, int]:
    """Counts (fewest, most) of a range of keep ratios.

    Raises: UserError for ratios outside (0, 1], in the wrong order, or that leave no patch.
    """
    low, high = keep_range
    if not 0.0 < low <= high <= 1.0:
        raise UserError(f"--keep-range {low:g} {high:g}: must rise within (0, 1]; 0.3 0.7 keeps 30 to 70 %")
    if low * num_patches < 0.5:
        raise UserError(f"--keep-range {low:g} {high:g}: {low:g} of {num_patches} patches leaves none; raise it")
    return num_keep(low, num_patches), num_keep(high, num_patches)


def drawn(spec: PruneSpec, counts: tuple[int, int], num_patches: int, seed: int, step: int) -> PruneSpec:
    """The spec of one training step: K uniform in `counts`, a function of seed and step alone."""
    K = int(torch.randint(counts[0], counts[1] + 1, (), generator=generator(seed, "keep", step)))
    return at_keep(spec, K, num_patches)
