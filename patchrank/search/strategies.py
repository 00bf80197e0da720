"""The table of search strategies: one row each; CLI choices, tests and the cost benchmark read it from here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from patchrank.errors import UserError
from patchrank.search.criteria import Damage
from patchrank.search.greedy import greedy
from patchrank.search.ranking import Ranking
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


@dataclass(frozen=True)
class Strategy:
    """run (variants, damage, options, generator) -> Ranking; `reads` names the options that change its result."""

    run: Callable[[Variants, Damage, Options, torch.Generator], Ranking]
    reads: tuple[str, ...] = ()

    def options(self, options: Options) -> dict:
        """The part of the options that this strategy reads, for the store's request."""
        return {name: getattr(options, name) for name in self.reads}


STRATEGIES: dict[str, Strategy] = {
    "greedy": Strategy(lambda v, d, o, g: greedy(v, d, step=o.step, decay=o.decay), ("step", "decay")),
    "sweep": Strategy(lambda v, d, o, g: sweep(v, d, window=o.window, stride=o.stride), ("window", "stride")),
}


def strategy_by_name(name: str) -> Strategy:
    """Row of the table. Raises: UserError for an unknown name."""
    if name not in STRATEGIES:
        raise UserError(f"--strategy {name}: unknown; choose one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
