"""Numbers of a report from records and their side files: paired differences, verdicts, means over data sets, fronts.

Letters: I images, R resamples, S data sets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from eval.records import DENSE, Record
from patchrank import metrics

TOLERANCE = 0.01
"""A row misses its budget if its MACs differ from it by more than this share of it."""
BETTER, TIE, WORSE = "better", "tie", "worse"

Key = tuple[str, float]
"""(method, budget)."""


@dataclass(frozen=True)
class Measured:
    """One record with what every image said."""

    record: Record
    sides: dict[str, np.ndarray]

    @property
    def key(self) -> Key:
        return self.record.method, self.record.macs


@dataclass(frozen=True)
class Difference:
    """Mean difference on the same images, 95 % bootstrap interval; fractions, positive = the first is better."""

    mean: float
    low: float
    high: float
    num_images: int

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval leaves out zero, else `tie`."""
        return BETTER if self.low > 0 else WORSE if self.high < 0 else TIE


@dataclass(frozen=True, kw_only=True)
class Panel:
    """All rows of one data set: the dense tower and every method, judged on the same images."""

    dataset: str
    task: str
    protocol: str
    dense: Measured
    rows: dict[Key, Measured]
    shorter: dict[Key, Measured] = field(default_factory=dict)
    """Rows on the first images only (an oracle is slow); never averaged with the others."""

    @property
    def num_images(self) -> int:
        return self.dense.record.num_images

    @property
    def budgets(self) -> list[float]:
        """From the largest to the smallest."""
        return sorted({macs for _, macs in self.rows}, reverse=True)


def paired(first: Measured, second: Measured, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values (I,) of both on the images that both judged, in the order of the first."""
    place_of = {image_id: place for place, image_id in enumerate(second.sides["ids"].tolist())}
    chosen = [place for place, image_id in enumerate(first.sides["ids"].tolist()) if image_id in place_of]
    there = [place_of[first.sides["ids"][place]] for place in chosen]
    return first.sides[name][chosen].astype(np.float64), second.sides[name][there].astype(np.float64)


def resampled(first: Measured, second: Measured, name: str, seed: int = 0) -> tuple[float, np.ndarray, int]:
    """Mean difference, its bootstrap values (R,), and the number of images."""
    value_I, other_I = paired(first, second, name)
    difference_I = value_I - other_I
    drawn_R1 = metrics.resampled_means(torch.from_numpy(difference_I).unsqueeze(1), seed=seed)
    return difference_I.mean().item(), drawn_R1[:, 0].numpy(), len(difference_I)


def difference(pairs: Sequence[tuple[Measured, Measured]], name: str) -> Difference:
    """Difference of two methods, as the mean over data sets (S pairs); images are drawn within each set.

    Raises: ValueError without pairs.
    """
    if not pairs:
        raise ValueError("a difference over no data sets is undefined; give at least one pair")
    found = [resampled(first, second, name, seed) for seed, (first, second) in enumerate(pairs)]
    mean = float(np.mean([one[0] for one in found]))
    low, high = metrics.interval(torch.from_numpy(np.mean([one[1] for one in found], axis=0)))
    return Difference(mean, low, high, sum(one[2] for one in found))


def share_of(record: Record) -> float:
    """MACs that a row really spends, over the dense ones."""
    return record.image_macs / record.dense_macs


def misses_budget(record: Record) -> bool:
    """More than 1 % off: not an equal comparison."""
    return record.method != DENSE and abs(share_of(record) - record.macs) > TOLERANCE * record.macs


def curve_of(panel: Panel, method: str, metric: str) -> list[tuple[float, float]]:
    """(MACs share, value) of a method over its budgets, rising; the dense tower closes it."""
    found = [
        (share_of(one.record), one.record.metrics[metric]) for one in panel.rows.values() if one.record.method == method
    ]
    return sorted([*found, (1.0, panel.dense.record.metrics[metric])])


def interpolated(curve: Sequence[tuple[float, float]], share: float) -> float | None:
    """Value of a rising curve at a share of the MACs, linear between its points; None outside of them."""
    shares = [point[0] for point in curve]
    if not curve or not shares[0] <= share <= shares[-1]:
        return None
    return float(np.interp(share, shares, [point[1] for point in curve]))


def front(points: Sequence[tuple[float, float]], slack: float = TOLERANCE) -> list[int]:
    """Indices of the points that no other beats: none is higher and at least as far to the right, but for `slack`.

    Args: points (x, y), more is better in both; slack: share of x within which two count as equally good.
    """
    beaten = lambda x, y: any(other_y > y and other_x >= x * (1 - slack) for other_x, other_y in points)  # noqa: E731
    return [place for place, (x, y) in enumerate(points) if not beaten(x, y)]
