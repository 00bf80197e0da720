"""Rows of the `search-truth` table from its journal: accuracy by keep ratio with paired bootstrap intervals.

Letters: I images, M keep ratios.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.journal import Journal
from patchrank.data import Item
from patchrank.metrics import interval, paired_interval, resampled_means

TRUTH_KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
FREE_ROWS = ("checkerboard", "random")
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class TruthRow:
    """One ranking under one `rest`. Fractions in [0, 1]; dicts by keep ratio as text, 1 = the unpruned tower."""

    strategy: str
    criterion: str | None
    """None for scorers that evaluate nothing; "label" is an oracle."""
    rest: str
    num_images: int
    dense_acc1: float
    acc1_at_keep: dict[str, float]
    acc1_interval_at_keep: dict[str, Interval]
    cosine_at_keep: dict[str, float]
    minus_dense_at_keep: dict[str, float]
    minus_dense_interval_at_keep: dict[str, Interval]
    minus_checkerboard_at_keep: dict[str, float]
    minus_checkerboard_interval_at_keep: dict[str, Interval]


def make_rows(items: Sequence[Item], journal: Journal) -> list[TruthRow]:
    """One row per ranking in the journal, over those of these images that it has."""
    keys = sorted({(one["rest"], one["criterion"] == "", one["strategy"], one["criterion"]) for one in journal})
    return [_row(items, journal, *key) for rest, _, *name in keys if (key := (rest, *name))[1] != "dense"]


def _row(items: Sequence[Item], journal: Journal, rest: str, strategy: str, criterion: str) -> TruthRow:
    ids = [item.id for item in items if (item.id, rest, strategy, criterion) in journal]
    dense_I = torch.tensor([journal.get(image_id, "", "dense", "")["hit"] for image_id in ids], dtype=torch.float64)
    hit_IM = _stack(journal, ids, (rest, strategy, criterion), "hit_M")
    free_IM = _stack(journal, ids, (rest, "checkerboard", ""), "hit_M")
    cosine_IM = _stack(journal, ids, (rest, strategy, criterion), "cosine_M")
    hit_IM, free_IM, cosine_IM = (  # column 0: all patches kept
        torch.cat([whole_I.unsqueeze(1), part_IM], dim=1)
        for whole_I, part_IM in ((dense_I, hit_IM), (dense_I, free_IM), (torch.ones_like(dense_I), cosine_IM))
    )
    mean_RM = resampled_means(hit_IM)
    return TruthRow(
        strategy=strategy,
        criterion=criterion or None,
        rest=rest,
        num_images=len(ids),
        dense_acc1=dense_I.mean().item(),
        acc1_at_keep=_by_keep(hit_IM.mean(0).tolist()),
        acc1_interval_at_keep=_by_keep([interval(mean_R) for mean_R in mean_RM.T]),
        cosine_at_keep=_by_keep(cosine_IM.mean(0).tolist()),
        minus_dense_at_keep=_by_keep((hit_IM - hit_IM[:, :1]).mean(0).tolist()),
        minus_dense_interval_at_keep=_by_keep([paired_interval(hit_I, dense_I) for hit_I in hit_IM.T]),
        minus_checkerboard_at_keep=_by_keep((hit_IM - free_IM).mean(0).tolist()),
        minus_checkerboard_interval_at_keep=_by_keep(
            [paired_interval(hit_I, free_I) for hit_I, free_I in zip(hit_IM.T, free_IM.T)]
        ),
    )


def _stack(journal: Journal, ids: list[str], key: tuple[str, str, str], field: str) -> Tensor:
    return torch.tensor([journal.get(image_id, *key)[field] for image_id in ids], dtype=torch.float64)


def _by_keep(values: list) -> dict:
    return {f"{keep:g}": value for keep, value in zip((1.0, *TRUTH_KEEPS), values, strict=True)}


def bend(row: TruthRow) -> float | None:
    """The largest keep ratio whose accuracy lies clearly (95 %) below the unpruned tower's; None if none does."""
    below = [float(keep) for keep, (_, high) in row.minus_dense_interval_at_keep.items() if high < 0]
    return max(below, default=None)


def peak(row: TruthRow) -> str:
    """The keep ratio, as text, of the highest accuracy; the largest of equals."""
    return max(row.acc1_at_keep, key=lambda keep: (row.acc1_at_keep[keep], float(keep)))


def wins(row: TruthRow) -> list[str]:
    """Keep ratios, as text, at which the row clearly (95 %) beats the checkerboard."""
    return [keep for keep, (low, _) in row.minus_checkerboard_interval_at_keep.items() if low > 0]
