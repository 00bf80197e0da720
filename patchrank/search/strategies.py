"""The table of search strategies: one row each; CLI choices, tests and the cost benchmark read it from here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from patchrank.errors import UserError
from patchrank.search.criteria import Damage
from patchrank.search.evolve import evolve
from patchrank.search.gradient import gradient
from patchrank.search.greedy import greedy
from patchrank.search.joint import joint
from patchrank.search.ranking import Ranking
from patchrank.search.regression import regression
from patchrank.search.sweep import sweep
from patchrank.search.variants import Variants


@dataclass(frozen=True, kw_only=True)
class Options:
    """What strategies can be told; each reads its own part (`Strategy.reads`)."""

    step: int = 1
    """greedy: patches taken away per round; 1 is exact"""
    decay: bool = False
    """greedy: let the step shrink with the number of survivors"""
    window: int = 1
    """sweep: side of the sliding window, in patches"""
    stride: int = 1
    """sweep: stride of the window, in patches"""
    rounds: int = 8
    """joint: rounds of elimination between keep 0.715 and 0.29"""
    tested: float = 0.21
    """joint: patches whose loss is measured in a round, as a share of those alive before the first"""
    steps: int = 22
    """gradient: gradient steps, the last seventh of them line searches"""
    randoms: int = 32
    """evolve: random covering rankings to begin with"""
    mutations: int = 4
    """evolve: rounds of mutation"""
    masks: int = 256
    """regression: random keep sets"""
    target: float = 0.5
    """regression: keep ratio of the random keep sets"""


@dataclass(frozen=True)
class Strategy:
    """run (variants, damage, options, generator) -> Ranking; `reads` names the options that change its result."""

    run: Callable[[Variants, Damage, Options, torch.Generator], Ranking]
    reads: tuple[str, ...] = ()

    def options(self, options: Options) -> dict:
        """The part of the options that this strategy reads, for the store's request."""
        return {name: getattr(options, name) for name in self.reads}


STRATEGIES: dict[str, Strategy] = {
    "joint": Strategy(lambda v, d, o, g: joint(v, d, g, rounds=o.rounds, tested=o.tested), ("rounds", "tested")),
    "gradient": Strategy(lambda v, d, o, g: gradient(v, d, g, steps=o.steps), ("steps",)),
    "evolve": Strategy(
        lambda v, d, o, g: evolve(v, d, g, randoms=o.randoms, rounds=o.mutations), ("randoms", "mutations")
    ),
    "regression": Strategy(lambda v, d, o, g: regression(v, d, g, masks=o.masks, target=o.target), ("masks", "target")),
    "greedy": Strategy(lambda v, d, o, g: greedy(v, d, step=o.step, decay=o.decay), ("step", "decay")),
    "sweep": Strategy(lambda v, d, o, g: sweep(v, d, window=o.window, stride=o.stride), ("window", "stride")),
}


DEFAULT = "joint"
"""The fast strategy that recovers most of exact greedy's headroom (docs/results/search_cost.json)."""


def strategy_by_name(name: str) -> Strategy:
    """Row of the table. Raises: UserError for an unknown name."""
    if name not in STRATEGIES:
        raise UserError(f"--strategy {name}: unknown; choose one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
