"""The table of search strategies: one row each; CLI choices, tests and the cost benchmark read it from here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from patchrank.errors import UserError
from patchrank.search.criteria import Damage
from patchrank.search.evolve import evolve
from patchrank.search.gradient import gradient
from patchrank.search.greedy import greedy
from patchrank.search.ranking import Ranking
from patchrank.search.regression import regression
from patchrank.search.shortlist import shortlist
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
    steps: int = 22
    """gradient: gradient steps, the last seventh of them line searches"""
    candidates: int = 14
    """shortlist: removals tested per round"""
    leave: int = 6
    """shortlist: patches taken away per round"""
    randoms: int = 32
    """evolve: random covering rankings to begin with"""
    rounds: int = 4
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
    "gradient": Strategy(lambda v, d, o, g: gradient(v, d, g, steps=o.steps), ("steps",)),
    "shortlist": Strategy(
        lambda v, d, o, g: shortlist(v, d, g, candidates=o.candidates, leave=o.leave), ("candidates", "leave")
    ),
    "evolve": Strategy(lambda v, d, o, g: evolve(v, d, g, randoms=o.randoms, rounds=o.rounds), ("randoms", "rounds")),
    "regression": Strategy(lambda v, d, o, g: regression(v, d, g, masks=o.masks, target=o.target), ("masks", "target")),
    "greedy": Strategy(lambda v, d, o, g: greedy(v, d, step=o.step, decay=o.decay), ("step", "decay")),
    "sweep": Strategy(lambda v, d, o, g: sweep(v, d, window=o.window, stride=o.stride), ("window", "stride")),
}


def strategy_by_name(name: str) -> Strategy:
    """Row of the table. Raises: UserError for an unknown name."""
    if name not in STRATEGIES:
        raise UserError(f"--strategy {name}: unknown; choose one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
