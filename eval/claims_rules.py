"""How a claim is judged: what was found, the rules, and the three verdicts; pure functions of numbers."""

from collections.abc import Callable
from dataclasses import dataclass

HOLDS, FAILS, NOT_TESTABLE = "holds", "fails", "not testable"
VERDICTS = (HOLDS, FAILS, NOT_TESTABLE)
SLACK = 1.05
"""A measured time may exceed a reported ratio by this factor: other machines, other kernels."""
HEADROOM = 0.95
"""Share of exact greedy's gain over the best free scorer from which a search counts as optimal."""
ROUNDING = 0.05
"""Half of the last digit that the papers print."""


class NotMeasured(Exception):
    """The result file or row of a claim is absent; its text is the command that measures it."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the result files say, in the unit of the claim."""

    value: float
    low: float | None = None
    high: float | None = None
    """The interval; None for numbers that are computed exactly."""
    spread: str | None = None
    """What the interval is."""
    setting: str
    """Model, data and size of our measurement."""
    command: str
    """What measured it."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """From a finding and the reported number to a verdict."""

    text: str
    """The rule in words."""
    bound: Callable[[float | None], float]
    """The number that the interval is held against, from the reported one."""
    more: bool
    """Whether the claim is that the value is above the bound; else at most the bound."""

    def judge(self, found: Found, reported: float | None) -> str:
        """One of VERDICTS; an exact number is its own interval."""
        low, high = (found.value if end is None else end for end in (found.low, found.high))
        bound = self.bound(reported)
        if self.more:
            return HOLDS if low > bound else FAILS if high < bound else NOT_TESTABLE
        return HOLDS if high <= bound else FAILS if low > bound else NOT_TESTABLE

    def doubt(self, found: Found, reported: float | None) -> str:
        """Why the verdict is `not testable` although there is a measurement."""
        return f"the interval reaches across {self.bound(reported):.3g}: too few images or runs to say"


GAIN = Rule(
    text="holds if the whole interval lies above 0, fails if below",
    bound=lambda _: 0.0,
    more=True,
)
AT_MOST = Rule(
    text="holds if the whole interval is at most the reported loss, fails if it lies above",
    bound=lambda reported: reported,
    more=False,
)
AS_MUCH = Rule(
    text="holds if the whole interval reaches the reported number, fails if it lies below",
    bound=lambda reported: reported,
    more=True,
)
FASTER = Rule(
    text="holds if the whole interval lies above 1, fails if below",
    bound=lambda _: 1.0,
    more=True,
)
TIME = Rule(
    text="holds if the whole range is at most 1.05 times the reported ratio, fails if it lies above",
    bound=lambda reported: SLACK * reported,
    more=False,
)
OPTIMAL = Rule(
    text="holds if the whole interval is above 0.95 of what exact greedy gains over the best free scorer",
    bound=lambda _: HEADROOM,
    more=True,
)
ADDS_UP = Rule(
    text="holds if the printed figure is what the described schedule costs, within rounding",
    bound=lambda reported: reported + ROUNDING,
    more=False,
)
