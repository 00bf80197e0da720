"""The two presets, and how `macs`, `keep`, `cuts` or a whole spec become one `PruneSpec`.

`accurate` spreads its cuts over several blocks, `low_latency` cuts once; both keep the patches that cover the image
best, fold the rest, and spend at most a given share of the dense image tower.
"""

import math
from collections.abc import Callable

from patchrank.errors import UserError
from patchrank.macs import pruned_macs
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig

Cost = Callable[[TowerConfig, PruneSpec], int]
"""MACs of a tower under a spec; without cuts, of the dense tower."""

_NUM_CUTS = 4


def default_layer(num_layers: int) -> int:
    """A quarter of the depth, but never before block 1 of a deeper tower: raw patches say too little."""
    return max(min(1, num_layers - 1), num_layers // 4)


def schedule(num_layers: int) -> tuple[tuple[int, float], ...]:
    """The `accurate` preset's cuts: ((layer, share of all removed patches), ...); the shares add up to 1."""
    first = default_layer(num_layers)
    layers = range(first, min(first + _NUM_CUTS, num_layers))
    return tuple((layer, 1 / len(layers)) for layer in layers)


def one_cut(config: TowerConfig, keep: float, *, layer: int | None = None, rest: str = "fold") -> PruneSpec:
    """One cut before block `layer` (None: a quarter of the depth) that leaves the share `keep` of all patches.

    Raises: UserError for keep outside (0, 1] or a layer outside the tower.
    """
    layer = default_layer(config.num_layers) if layer is None else layer
    if layer < 0:
        raise UserError(
            f"layer={layer}: outside this tower of {config.num_layers} blocks; use 0 to {config.num_layers - 1}"
        )
    spec = PruneSpec(cuts=((layer, keep),), rest=rest, select="suppress")
    spec.check_layers(config.num_layers)
    return spec


def spread_cuts(config: TowerConfig, K: int, *, rest: str = "fold") -> PruneSpec:
    """The schedule's cuts with K of N patches left after the last; a cut with nothing to remove is left out."""
    num_patches, cuts, done, left = config.num_patches, [], 0.0, config.num_patches
    for layer, share in schedule(config.num_layers):
        done += share
        after = num_patches - round((num_patches - K) * min(done, 1.0))
        if after < left:
            cuts.append((layer, after / num_patches))
        left = after
    return PruneSpec(cuts=tuple(cuts), rest=rest, select="suppress")


def _within(config: TowerConfig, macs: float, build: Callable[[int], PruneSpec], cost: Cost) -> PruneSpec:
    """The spec of most patches whose cost is at most `macs` of the dense tower."""
    dense = cost(config, PruneSpec(cuts=()))
    if 0.0 < macs <= 1.0:
        for K in range(config.num_patches, 0, -1):
            spec = build(K)
            if cost(config, spec) <= macs * dense:
                return spec
    lowest = math.ceil(1000 * cost(config, build(1)) / dense) / 1000
    raise UserError(
        f"macs={macs:g}: this image tower reaches {lowest:.3f} to 1 of its dense MACs; choose a value there"
    )


def spec_for_macs(config: TowerConfig, macs: float, *, rest: str = "fold", cost: Cost = pruned_macs) -> PruneSpec:
    """The `accurate` preset: several cuts, covering selection, fold, at most `macs` of the dense image tower's MACs.

    Args: macs in (0, 1]; cost counts the MACs of both towers (default: the last block computes one row in both).
    Raises: UserError for a share that the schedule cannot reach, naming the range that it can.
    """
    return _within(config, macs, lambda K: spread_cuts(config, K, rest=rest), cost)


def low_latency(
    config: TowerConfig, macs: float, *, layer: int | None = None, rest: str = "fold", cost: Cost = pruned_macs
) -> PruneSpec:
    """The `low-latency` preset: as `spec_for_macs`, with one cut before block `layer` (None: quarter of the depth)."""

    def build(K: int) -> PruneSpec:
        if K == config.num_patches:
            return PruneSpec(cuts=(), rest=rest, select="suppress")
        return one_cut(config, K / config.num_patches, layer=layer, rest=rest)

    return _within(config, macs, build, cost)


def resolve_spec(
    config: TowerConfig,
    *,
    macs: float | None = None,
    keep: float | None = None,
    cuts: tuple[tuple[int, float], ...] | None = None,
    spec: PruneSpec | None = None,
    layer: int | None = None,
    rest: str | None = None,
    cost: Cost = pruned_macs,
) -> PruneSpec:
    """One spec from what a caller may say: exactly one of `macs`, `keep`, `cuts`, `spec`.

    Args: macs share of the dense MACs in (0, 1] (`accurate` preset); keep share of the patches in (0, 1], one cut at
    `layer` (None: a quarter of the depth); cuts ((layer, keep), ...); spec as it is; rest "fold" (None) or "drop".
    Raises: UserError for none or several of the four, for `layer` without `keep`, for `rest` beside `spec`.
    """
    given = {"macs": macs, "keep": keep, "cuts": cuts, "spec": spec}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        said = " and ".join(names) or "nothing"
        raise UserError(f"{said} given: exactly one of {', '.join(given)} decides how much is pruned; try macs=0.7")
    if layer is not None and keep is None:
        raise UserError(f"layer={layer}: goes with keep only; {names[0]} brings its own layers, leave layer out")
    if spec is not None:
        if rest is not None:
            raise UserError(f"rest={rest!r}: the spec already says rest={spec.rest!r}; set it there")
        spec.check_layers(config.num_layers)
        return spec
    rest = "fold" if rest is None else rest
    if macs is not None:
        return spec_for_macs(config, macs, rest=rest, cost=cost)
    if keep is not None:
        return one_cut(config, keep, layer=layer, rest=rest)
    spec = PruneSpec(cuts=cuts, rest=rest, select="suppress")
    spec.check_layers(config.num_layers)
    return spec
