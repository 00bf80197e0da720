"""Load-adaptive keep: how far a client prunes, as a pure function of what it saw in the last moments.

The ladder's level 0 is the dearest variant. Too slow or refused: one step down the ladder at once (refused: to its
end). Calm for `patience` moments: one step up, on probation. If the higher level turns out too slow during its
probation, patience doubles, so that a load between two levels does not make the client swing for ever (exponential
back-off); a survived probation resets it. Between the two thresholds nothing changes (hysteresis).
"""

from dataclasses import dataclass, replace

from patchrank.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the client wants. Raises: UserError for numbers outside their rules."""

    num_levels: int
    target_ms: float = 100.0
    """Latency that most answers shall stay under."""
    high: float = 1.0
    """Pressure (latency / target) above which pruning grows."""
    low: float = 0.5
    """Pressure below which a moment counts as calm."""
    patience: int = 4
    """Calm moments before a step up, and moments that it is on probation."""
    max_patience: int = 64

    def __post_init__(self) -> None:
        if self.num_levels < 1:
            raise UserError(f"num_levels={self.num_levels}: must be 1 or more; export more keep rates")
        if not 0 < self.low < self.high:
            raise UserError(f"low={self.low:g}, high={self.high:g}: must rise from above 0")
        if self.target_ms <= 0:
            raise UserError(f"target_ms={self.target_ms:g}: must be above 0")
        if not 1 <= self.patience <= self.max_patience:
            raise UserError(f"patience={self.patience}, max_patience={self.max_patience}: must rise from 1")


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What a client saw in one stretch of time."""

    latency_ms: float = 0.0
    """A high quantile over answers; 0 where none came and none was due."""
    refused: int = 0
    """Requests that the server turned away."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """Where on the ladder a client stands; the policy's whole memory."""

    level: int = 0
    calm: int = 0
    """Calm moments in a row."""
    patience: int = 0
    """Calm moments that the next step up takes; 0 stands for the policy's."""
    probation: int = 0
    """Moments left in which a step up may turn out wrong."""


def pressure(policy: Policy, moment: Moment) -> float:
    """Latency over target; infinite if anything was refused."""
    return float("inf") if moment.refused else moment.latency_ms / policy.target_ms


def step(policy: Policy, now: Level, moment: Moment) -> Level:
    """The level for the next moment."""
    felt = pressure(policy, moment)
    patience = now.patience or policy.patience
    if felt > policy.high:
        last = policy.num_levels - 1
        patience = min(2 * patience, policy.max_patience) if now.probation else patience
        return Level(level=last if moment.refused else min(now.level + 1, last), patience=patience)
    probation = max(0, now.probation - 1)
    if now.probation == 1:
        patience = policy.patience
    if felt >= policy.low:
        return replace(now, calm=0, patience=patience, probation=probation)
    if now.calm + 1 < patience or now.level == 0:
        return replace(now, calm=min(now.calm + 1, patience), patience=patience, probation=probation)
    return Level(level=now.level - 1, patience=patience, probation=patience)
