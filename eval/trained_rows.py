"""Rows of `python -m eval trained` from its journal: means over images and seeds, paired bootstrap intervals.

Letters: I images.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from eval.journal import Journal
from eval.trained_methods import MODES, Entry
from patchrank import metrics

DENSE = "dense"
_COLUMNS = ("cosine", "agrees", "hit")


def column(journal: Journal, key: str, macs: float, name: str) -> Tensor | None:
    """One number for every image (I,), in the order of the batches; None where the journal has none."""
    records = [record for record in journal if record["method"] == key and record["macs"] == macs]
    records.sort(key=lambda record: record["batch"])
    if not records or any(record.get(name) is None for record in records):
        return None
    return torch.tensor([float(value) for record in records for value in record[name]])


def _common(*columns: Tensor) -> list[Tensor]:
    """The images that all columns have: batches are measured in order, so these are the first ones."""
    num_images = min(map(len, columns))
    return [column[:num_images] for column in columns]


def _mean(columns: Iterable[Tensor | None]) -> Tensor | None:
    """Mean over seeds (I,)."""
    found = list(columns)
    return None if not found or any(one is None for one in found) else torch.stack(_common(*found)).mean(0)


def _share(value_I: Tensor | None) -> float | None:
    return None if value_I is None else value_I.double().mean().item()


def _interval(value_I: Tensor | None) -> list[float] | None:
    if value_I is None:
        return None
    return list(metrics.interval(metrics.resampled_means(value_I.unsqueeze(1))[:, 0]))


def _paired(value_I: Tensor | None, other_I: Tensor | None) -> list[float] | None:
    return None if value_I is None or other_I is None else list(metrics.paired_interval(*_common(value_I, other_I)))


def make_rows(
    journal: Journal, entries: Sequence[Entry], ms: dict[str, float], others: Mapping[str, Journal] | None = None
) -> list[dict]:
    """One row per method and budget, seeds together, in the order of `entries`.

    `paired_diff_ci95` is accuracy minus that of the unpruned tower on the same images; `cosine_behind` is how far the
    row's cosine lies behind that of our best row of each mode at its budget (below 0: ahead), mean and interval.
    Args: ms, milliseconds of a batch of 16 by the entry's key and budget, where measured; others, the same methods on
    other data sets, for `pooled`.
    """
    dense_hit_I = column(journal, DENSE, 1.0, "hit")
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        rest = None if entry.spec is None else entry.spec.rest
        groups.setdefault((entry.budget, entry.method, entry.mode, rest), []).append(entry)
    found = {
        group: {name: _mean(column(journal, one.key, one.budget, name) for one in members) for name in _COLUMNS}
        for group, members in groups.items()
    }
    measured = {group: numbers for group, numbers in found.items() if numbers["cosine"] is not None}
    best = _best(measured, groups)
    rows = [_row(groups[group], numbers, dense_hit_I, best, measured, ms) for group, numbers in measured.items()]
    if others:
        for row, group in zip(rows, measured):
            row["pooled"] = _pooled([journal, *others.values()], groups[group])
    return rows


def _pooled(journals: Sequence[Journal], members: list[Entry]) -> dict | None:
    """One method on the images of all journals together; None where one of them lacks it."""
    columns = {name: [] for name in (*_COLUMNS, "dense")}
    for journal in journals:
        own = {name: _mean(column(journal, one.key, one.budget, name) for one in members) for name in _COLUMNS}
        own["dense"] = column(journal, DENSE, 1.0, "hit")
        if any(value_I is None for value_I in own.values()):
            return None
        for name, value_I in zip(own, _common(*own.values())):
            columns[name].append(value_I)
    cosine_I, agrees_I, hit_I, dense_I = (torch.cat(parts) for parts in columns.values())
    return {
        "num_images": len(hit_I),
        "acc1": _share(hit_I),
        "paired_diff": _share(hit_I - dense_I),
        "paired_diff_ci95": _paired(hit_I, dense_I),
        "feature_cosine": _share(cosine_I),
        "top1_agreement": _share(agrees_I),
    }


def _best(measured: dict[tuple, dict], groups: dict[tuple, list[Entry]]) -> dict[tuple[float, str], tuple]:
    """(budget, mode) -> our group of the highest mean cosine under fold."""
    best: dict[tuple[float, str], tuple] = {}
    for group, numbers in measured.items():
        budget, _, mode, rest = group
        if groups[group][0].family != "ours" or rest == "drop":
            continue
        if (budget, mode) not in best or numbers["cosine"].mean() > measured[best[budget, mode]]["cosine"].mean():
            best[budget, mode] = group
    return best


def _row(members: list[Entry], numbers: dict, dense_hit_I, best: dict, measured: dict, ms: dict[str, float]) -> dict:
    entry = members[0]
    spec = None if entry.spec is None else entry.spec.to_dict()
    behind = {}
    for mode in MODES:
        if (entry.budget, mode) in best:
            ours_I, own_I = _common(measured[best[entry.budget, mode]]["cosine"].double(), numbers["cosine"].double())
            behind[mode] = {"mean": (ours_I - own_I).mean().item(), "ci95": _paired(ours_I, own_I)}
    return {
        "method": entry.method,
        "family": entry.family,
        "mode": entry.mode,
        "budget": entry.budget,
        "rest": spec and spec["rest"],
        "select": spec and spec["select"],
        "where": spec and spec["where"],
        "cuts": spec and [[layer, round(keep * 1000) / 1000] for layer, keep in spec["cuts"]],
        "keep": spec and spec["cuts"][-1][1],
        "num_added": spec["num_added"] if spec else 0,
        "image_macs": entry.image_macs,
        "trained_on": entry.trained_on,
        "acc1": _share(numbers["hit"]),
        "acc1_ci95": _interval(numbers["hit"]),
        "paired_diff_ci95": _paired(numbers["hit"], dense_hit_I),
        "feature_cosine": _share(numbers["cosine"]),
        "feature_cosine_ci95": _interval(numbers["cosine"]),
        "top1_agreement": _share(numbers["agrees"]),
        "cosine_behind": behind,
        "ms_batch16": ms.get(entry.timed_as),
        "seeds": sorted({one.seed for one in members if one.seed is not None}),
        "num_images": len(numbers["cosine"]),
    }


def text_lines(rows: list[dict]) -> list[list[str]]:
    """Cells of a table, best cosine first within a budget."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    ordered = sorted(rows, key=lambda row: (-row["budget"], -row["feature_cosine"]))
    return [
        [
            f"{row['method']} ({row['mode']}{', ' + row['rest'] if row['rest'] else ''})",
            f"{100 * row['budget']:g}",
            f"{row['image_macs'] / 1e6:.0f}",
            f"{row['feature_cosine']:.4f}",
            percent(row["top1_agreement"]),
            percent(row["acc1"]),
        ]
        for row in ordered
    ]
