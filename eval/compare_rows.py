"""Rows of the `compare` table from its journal: means, and paired differences to our method; nothing is run.

Letters: I images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.journal import Journal
from eval.rivals import OURS, RIVALS
from patchrank import metrics
from patchrank.macs import dense_macs
from patchrank.tower import TowerConfig

DENSE = "dense"
TOLERANCE = 0.01
"""A row misses its budget if its MACs differ from it by more than this share of it."""


@dataclass(frozen=True, kw_only=True)
class Against:
    """Mean difference to ours on the same images, with its 95 % bootstrap interval; positive = better than ours."""

    mean: float
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class CompareRow:
    """One method at one budget. Fractions in [0, 1]; MACs per image of the image tower; 1 MAC = 2 FLOP."""

    rival: str
    text: str
    macs: float
    """The budget, as a share of the dense MACs."""
    macs_share: float
    """What the method really costs, as such a share."""
    macs_per_image: int
    misses_budget: bool
    """Differs from the budget by more than 1 % of it: not an equal comparison."""
    num_images: int
    cosine: float
    """To the unpruned feature, mean over the images."""
    agreement: float | None
    """Share of images with the unpruned tower's answer; None without classes."""
    acc1: float | None
    """Top-1 accuracy; None without labels."""
    dense_acc1: float | None
    cosine_against: Against | None
    """None in our own row."""
    agreement_against: Against | None
    acc1_against: Against | None


@dataclass(frozen=True, kw_only=True)
class Unreached:
    """A method that a budget or a tower rules out."""

    rival: str
    macs: float
    reason: str


@dataclass(frozen=True)
class _Found:
    cosine_I: Tensor
    agrees_I: Tensor | None
    hit_I: Tensor | None


def _column(records: list[dict], name: str) -> Tensor | None:
    """Values of all batches in their order, float64; None if a batch has none."""
    if any(record[name] is None for record in records):
        return None
    return torch.tensor([value for record in records for value in record[name]], dtype=torch.float64)


def _records(journal: Journal, rival: str, macs: float) -> list[dict]:
    found = [record for record in journal if record["rival"] == rival and record["macs"] == macs]
    return sorted(found, key=lambda record: record["batch"])


def _against(value_I: Tensor | None, ours_I: Tensor | None) -> Against | None:
    if value_I is None or ours_I is None:
        return None
    return Against(mean=(value_I - ours_I).mean().item(), interval=metrics.paired_interval(value_I, ours_I))


def _mean(value_I: Tensor | None) -> float | None:
    return None if value_I is None else value_I.mean().item()


def make_rows(journal: Journal, macs_of: dict[tuple[str, float], int], config: TowerConfig) -> list[CompareRow]:
    """Rows in the order of `macs_of`, {(rival, budget): MACs per image}; every budget has our method."""
    dense = dense_macs(config)
    found = {}
    for rival, macs in macs_of:
        records = _records(journal, rival, macs)
        found[rival, macs] = _Found(*(_column(records, name) for name in ("cosine", "agrees", "hit")))
    dense_acc1 = _mean(_column(_records(journal, DENSE, 1.0), "hit"))
    rows = []
    for (rival, macs), one in found.items():
        ours, share = found[OURS, macs], macs_of[rival, macs] / dense
        others = rival != OURS
        rows.append(
            CompareRow(
                rival=rival,
                text=RIVALS[rival].text,
                macs=macs,
                macs_share=share,
                macs_per_image=macs_of[rival, macs],
                misses_budget=abs(share - macs) > TOLERANCE * macs,
                num_images=len(one.cosine_I),
                cosine=one.cosine_I.mean().item(),
                agreement=_mean(one.agrees_I),
                acc1=_mean(one.hit_I),
                dense_acc1=dense_acc1,
                cosine_against=_against(one.cosine_I, ours.cosine_I) if others else None,
                agreement_against=_against(one.agrees_I, ours.agrees_I) if others else None,
                acc1_against=_against(one.hit_I, ours.hit_I) if others else None,
            )
        )
    return rows


def best_rival(rows: list[CompareRow]) -> CompareRow | None:
    """The published or obvious method of highest cosine among rows of one budget that meet it; None without any."""
    others = [row for row in rows if not row.rival.startswith(OURS) and not row.misses_budget]
    return max(others, key=lambda row: row.cosine, default=None)
