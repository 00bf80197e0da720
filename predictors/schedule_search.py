"""Which cuts, and how many patches behind each, keep the feature best at a budget.

Three small families, all brought to the budget exactly: one cut at every layer; equal ratios over every span of
blocks; and a dynamic programme over layers and counts, whose damage table comes from single cuts. The best of them by
feature cosine on a few train images is then improved by single moves.

Letters: N patches, K kept, G grid of counts.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from patchrank.errors import UserError
from patchrank.presets import Cost
from patchrank.pruned import PrunedTower, Scorer
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig, VisionTower
from predictors.cache import Tokens
from predictors.judging import cosines, pruned_features
from predictors.schedule_costs import StageCosts
from predictors.schedules import within

Name = TypeVar("Name")
Judge = Callable[[PruneSpec], float]
"""Spec -> mean feature cosine on the images that decide."""
TABLE_KEEPS = (0.85, 0.7, 0.55, 0.4, 0.25, 0.12)
"""Ratios at which the damage of single cuts is measured."""
FAMILIES = ("one cut", "equal ratios", "programme")
"""How the names of the schedules of each family begin."""
_GRID = 28
_LEAST = 0.1


def cosine_judge(tower: VisionTower, tokens: Tokens, scorer: Scorer) -> Judge:
    """Judge by a scorer that needs no training, on tokens that enter block 0."""

    def judge(spec: PruneSpec) -> float:
        features = pruned_features(PrunedTower(tower, spec, scorer), tokens, 0)
        return cosines(features, tokens.feature_nD).mean().item()

    return judge


def inner(config: TowerConfig) -> range:
    """Blocks that a cut inside can stand in: not the last one, which may compute a single row."""
    return range(max(1, config.num_layers - 1))


def to_budget(specs: dict[Name, PruneSpec], share: float, config: TowerConfig, cost: Cost) -> dict[Name, PruneSpec]:
    """Each spec with the most patches that a budget allows; those that cannot reach it are left out."""
    found = {}
    for name, spec in specs.items():
        try:
            found[name] = within(spec, share, config, cost)
        except UserError:
            continue
    return found


def one_cuts(config: TowerConfig, share: float, manner: PruneSpec, cost: Cost) -> dict[str, PruneSpec]:
    """One cut before every block but the first (of a deeper tower), {name: spec at the budget}."""
    layers = range(min(1, config.num_layers - 1), config.num_layers)
    specs = {f"one cut at {layer}": replace(manner, cuts=((layer, 0.5),), where="before") for layer in layers}
    return to_budget(specs, share, config, cost)


def equal_ratios(manner: PruneSpec, layers: Sequence[int]) -> PruneSpec:
    """Cuts inside these blocks that each keep the same share of what is there, some share."""
    return replace(manner, cuts=tuple((layer, 0.9 ** (i + 1)) for i, layer in enumerate(layers)), where="inside")


def spans(config: TowerConfig, share: float, manner: PruneSpec, cost: Cost) -> dict[str, PruneSpec]:
    """Equal ratios inside every block from `first` to `last`, two blocks at least, {name: spec at the budget}."""
    layers = inner(config)
    specs = {
        f"equal ratios in {first}-{last}": equal_ratios(manner, range(first, last + 1))
        for first in layers[:-1]
        for last in layers[first + 1 :]
    }
    return to_budget(specs, share, config, cost)


@dataclass(frozen=True)
class DamageTable:
    """1 - cosine of a single cut inside each layer, at falling keep ratios."""

    layers: tuple[int, ...]
    keeps: tuple[float, ...]
    damage: tuple[tuple[float, ...], ...]

    def at(self, place: int, keep: float) -> float:
        """Damage of a cut at `layers[place]`, with straight lines in keep and none at keep 1; never below zero."""
        rising = [0.0, *np.maximum.accumulate(np.maximum(self.damage[place], 0.0)).tolist()]
        return float(np.interp(-keep, [-1.0, *(-keep for keep in self.keeps)], rising))


def damage_table(config: TowerConfig, manner: PruneSpec, judge: Judge) -> DamageTable:
    """Measure every layer at every ratio of TABLE_KEEPS."""
    layers = tuple(inner(config))
    damage = tuple(
        tuple(1 - judge(replace(manner, cuts=((layer, keep),), where="inside")) for keep in TABLE_KEEPS)
        for layer in layers
    )
    return DamageTable(layers, TABLE_KEEPS, damage)


def programme(config: TowerConfig, manner: PruneSpec, table: DamageTable, costs: StageCosts, price: float) -> PruneSpec:
    """The cuts that make damage + price * cost least, by dynamic programming over layers and counts.

    Damage is taken as additive: going from n to k patches at a layer adds what a single cut to k adds there over a
    single cut to n. Returns: a spec with cuts inside the blocks; without cuts where nothing is worth cutting.
    """
    num_patches, prefix = config.num_patches, config.num_prefix
    counts = sorted({round(num_patches * _LEAST ** (step / (_GRID - 1))) for step in range(_GRID)} - {0}, reverse=True)
    worth = np.full(len(counts), np.inf)
    worth[0] = 0.0
    choice = np.zeros((len(table.layers), len(counts)), dtype=int)
    sized = manner.rest == "fold"
    for place in range(len(table.layers)):
        found = np.full(len(counts), np.inf)
        harm = [table.at(place, K / num_patches) for K in counts]
        for after, K in enumerate(counts):
            for before in range(after + 1):
                n = counts[before]
                cost = costs.attend(prefix + n, sized and n < num_patches) + costs.mlp(prefix + K)
                cost += costs.cut(n, K) if K < n else 0.0
                value = worth[before] + max(0.0, harm[after] - harm[before]) + price * cost
                if value < found[after]:
                    found[after], choice[place, after] = value, before
        worth = found
    ends = [worth[i] + price * costs.last(prefix + K, sized) for i, K in enumerate(counts)]
    state, cuts = int(np.argmin(ends)), []
    for place in reversed(range(len(table.layers))):
        before = int(choice[place, state])
        if before != state:
            cuts.append((table.layers[place], counts[state] / num_patches))
        state = before
    return replace(manner, cuts=tuple(reversed(cuts)), where="inside")


def programmes(
    config: TowerConfig, share: float, manner: PruneSpec, table: DamageTable, costs: StageCosts, cost: Cost
) -> dict[str, PruneSpec]:
    """Solutions around the budget: prices are bisected until the programme's cost meets it, then scaled exactly."""
    dense = cost(config, PruneSpec(cuts=()))
    low, high, specs = 0.0, 10.0 / dense, {}
    for _ in range(12):
        price = (low + high) / 2
        spec = programme(config, manner, table, costs, price)
        if spec.cuts:
            specs[spec.cuts] = spec
        low, high = (price, high) if cost(config, spec) > share * dense else (low, price)
    near = sorted(specs.values(), key=lambda spec: abs(cost(config, spec) - share * dense))[:4]
    return to_budget({f"programme {i}": spec for i, spec in enumerate(near)}, share, config, cost)


def moved(spec: PruneSpec, config: TowerConfig, generator: torch.Generator) -> PruneSpec:
    """A neighbour: one cut a layer up or down, one cut more or less, or patches from one cut to the next."""
    layers = list(inner(config))
    ratios = _ratios(spec)
    kind, place = (int(torch.randint(n, (), generator=generator)) for n in (4, len(spec.cuts)))
    at = [layer for layer, _ in spec.cuts]
    free = [layer for layer in layers if layer not in at]
    if kind == 0 and free:
        near = min(free, key=lambda layer: (abs(layer - at[place]), torch.rand((), generator=generator).item()))
        at[place] = near
    elif kind == 1 and free:
        near = min(free, key=lambda layer: (abs(layer - at[place]), torch.rand((), generator=generator).item()))
        at, ratios = [*at, near], [*ratios, ratios[place] ** 0.5]
        ratios[place] **= 0.5
    elif kind == 2 and len(at) > 1:
        del at[place], ratios[place]
    else:
        ratios[place] **= math.exp(0.5 * torch.randn((), generator=generator).item())
    passed, cuts = 1.0, []
    for layer, ratio in sorted(zip(at, ratios)):
        passed *= ratio
        cuts.append((layer, max(passed, 1e-3)))
    return replace(spec, cuts=tuple(cuts))


def _ratios(spec: PruneSpec) -> list[float]:
    """What each cut keeps of what it sees."""
    keeps = [1.0, *(keep for _, keep in spec.cuts)]
    return [after / before for before, after in itertools.pairwise(keeps)]


def improve(
    spec: PruneSpec, share: float, config: TowerConfig, cost: Cost, judge: Judge, *, num_moves: int, seed: int = 0
) -> PruneSpec:
    """Hill climbing by `moved`, each neighbour brought to the budget; only cuts inside blocks are moved."""
    best, value, generator = spec, judge(spec), torch.Generator().manual_seed(seed)
    for _ in range(num_moves):
        for candidate in to_budget({"": moved(best, config, generator)}, share, config, cost).values():
            if candidate.cuts != best.cuts and (found := judge(candidate)) > value:
                best, value = candidate, found
    return best
