"""The two presets, and how `macs`, `keep`, `cuts` or a whole spec become one `PruneSpec`.

`accurate` spreads its cuts over several blocks, `low_latency` cuts once; both keep the patches that cover the image
best, fold the rest, and spend at most a given share of the dense image tower.

The schedule of `accurate` was chosen on 300 Tiny-ImageNet train images with a ViT-Ti, against ToMe at equal MACs:
cuts inside the blocks (their keys are at hand), from a sixth of the depth on, and equal ratios rather than equal
counts, which starve the upper blocks at low budgets. `python -m eval compare` repeats the comparison.
"""

import math
from collections.abc import Callable

from patchrank.errors import UserError
from patchrank.macs import pruned_macs
from patchrank.spec import PruneSpec
from patchrank.tokens import num_keep
from patchrank.tower import TowerConfig

Cost = Callable[[TowerConfig, PruneSpec], int]
"""MACs of a tower under a spec; without cuts, of the dense tower."""

DEFAULT_MACS = 0.7
"""Budget of a command that is told none: share of the dense image tower's MACs."""
_SHARES = 10_000
"""Resolution of the share of patches that each cut of `accurate` keeps."""


def check_macs(macs: float, flag: str = "--macs") -> None:
    """Raises: UserError for a share outside (0, 1]."""
    if not 0.0 < macs <= 1.0:
        raise UserError(f"{flag} {macs:g}: must lie in (0, 1]; 0.7 is 70 % of the dense MACs")


def default_layer(num_layers: int) -> int:
    """A quarter of the depth, but never before block 1 of a deeper tower: raw patches say too little."""
    return max(min(1, num_layers - 1), num_layers // 4)


def schedule(num_layers: int) -> tuple[int, ...]:
    """The blocks that `accurate` cuts in: 2 to 9 of 12, and the same twelfths of another depth (at most eight).

    Never the first or the last block where the tower has others: raw patches say too little, and the last block may
    compute one row only.
    """
    last = max(0, num_layers - 2)
    return tuple(sorted({min(max(1, twelfth * num_layers // 12), last) for twelfth in range(2, 10)}))


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


def spread_cuts(config: TowerConfig, share: float, *, rest: str = "fold") -> PruneSpec:
    """Cuts inside the schedule's blocks, each keeping `share` in (0, 1] of what is there, at least one patch.

    A cut that would remove nothing is left out.
    """
    num_patches, cuts, left = config.num_patches, [], config.num_patches
    for place, layer in enumerate(schedule(config.num_layers), start=1):
        K = num_keep(share**place, num_patches)
        if K < left:
            cuts.append((layer, K / num_patches))
        left = K
    return PruneSpec(cuts=tuple(cuts), where="inside", rest=rest, select="suppress")


def _within(config: TowerConfig, macs: float, build: Callable[[int], PruneSpec], largest: int, cost: Cost) -> PruneSpec:
    """The spec of the largest setting in 1 .. largest whose cost is at most `macs` of the dense tower, by bisection.

    The result always meets the budget. Costs rise with the setting except close to 1, where a cut may cost more than
    it saves; only there a larger setting might have fitted too.
    """
    dense = cost(config, PruneSpec(cuts=()))
    lowest = cost(config, build(1)) / dense
    if not lowest <= macs <= 1.0:
        raise UserError(
            f"macs={macs:g}: this image tower reaches {math.ceil(1000 * lowest) / 1000:.3f} to 1 of its dense MACs; "
            "choose a value there"
        )
    if macs == 1.0:
        return build(largest)
    low, high = 1, largest - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(config, build(middle)) <= macs * dense else (low, middle - 1)
    return build(low)


def spec_for_macs(config: TowerConfig, macs: float, *, rest: str = "fold", cost: Cost = pruned_macs) -> PruneSpec:
    """The `accurate` preset: several cuts, covering selection, fold, at most `macs` of the dense image tower's MACs.

    Args: macs in (0, 1]; cost counts the MACs of both towers (default: the last block computes one row in both).
    Raises: UserError for a share that the schedule cannot reach, naming the range that it can.
    """
    return _within(config, macs, lambda step: spread_cuts(config, step / _SHARES, rest=rest), _SHARES, cost)


def low_latency(
    config: TowerConfig, macs: float, *, layer: int | None = None, rest: str = "fold", cost: Cost = pruned_macs
) -> PruneSpec:
    """The `low-latency` preset: as `spec_for_macs`, with one cut before block `layer` (None: quarter of the depth)."""

    def build(K: int) -> PruneSpec:
        if K == config.num_patches:
            return PruneSpec(cuts=(), rest=rest, select="suppress")
        return one_cut(config, K / config.num_patches, layer=layer, rest=rest)

    return _within(config, macs, build, config.num_patches, cost)


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
