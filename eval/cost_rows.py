"""Rows of the `search-cost` table from its journals: pure bookkeeping, nothing is run.

Letters: I images, M keep ratios.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from eval.cost_measure import UNCACHED, Bench
from eval.journal import Journal
from eval.orders import EXACT
from eval.quality import ACC_KEEPS, CURVE_KEEPS, auc, best_free, recovered_headroom
from eval.uncached import cached_macs, uncached_macs

REFERENCES = (UNCACHED, EXACT, "greedy-8")
SOURCES = {"search": "measured", "rounds": "extrapolated"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One ranking under one `rest`. Fractions in [0, 1]; MACs and seconds per image; 1 MAC = 2 FLOP."""

    strategy: str
    criterion: str | None
    """None for scorers that evaluate nothing."""
    rest: str
    num_images: int
    macs_per_image: int
    """What is computed, padding included; for uncached exact greedy the closed form."""
    macs_closed_form: int | None
    """Exact greedy without the padding of chunks."""
    seconds_per_image: float | None
    """Median over the images that were timed."""
    seconds_source: str
    """"measured"; "extrapolated" from every 16th round; "not timed"."""
    seconds_range: tuple[float, float] | None
    """Fastest and slowest image."""
    seconds_full_image: float | None
    """Exact greedy: all rounds of one image, as a check of the extrapolation."""
    num_timed: int
    auc: float
    auc_interval: tuple[float, float]
    auc_free: float
    best_free: str
    auc_exact: float
    quality: float | None
    quality_interval: tuple[float, float] | None
    kendall_tau: float
    """Agreement with the order of exact greedy."""
    acc1_at_keep: dict[str, float] | None
    cosine_at_keep: dict[str, float]
    times_fewer_macs: dict[str, float] = field(default_factory=dict)
    """Against each reference row of the same `rest`."""
    times_faster: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What the journals say about one ranking: tensors over the images of one `rest`."""

    cosine_IM: Tensor
    hit_IM: Tensor | None
    tau_I: Tensor
    macs_I: Tensor | None


def gather(records: list[dict]) -> Found:
    """Stack the records of one ranking."""
    hits = [record["hit_M"] for record in records]
    macs = [record.get("macs") for record in records]
    return Found(
        torch.tensor([record["cosine_M"] for record in records], dtype=torch.float64),
        None if None in hits else torch.tensor(hits, dtype=torch.float64),
        torch.tensor([record["tau"] for record in records], dtype=torch.float64),
        None if None in macs else torch.tensor(macs, dtype=torch.float64),
    )


def seconds_of(journal: Journal, rest: str, name: str, kind: str) -> list[float]:
    """Seconds of every timed image of a row."""
    wanted = (rest, name, kind)
    return [one["seconds"] for one in journal if (one["rest"], one["ranking"], one["kind"]) == wanted]


def make_rows(bench: Bench, rest: str, worths: Journal, times: Journal, prior: dict[str, dict]) -> list[Row]:
    """Rows of one `rest`: uncached exact greedy, the searches, the free scorers. Broken images have no records."""
    ids = [item.id for item in bench.images[rest] if (item.id, rest, EXACT) in worths]
    found = {name: gather([worths.get(i, rest, name) for i in ids]) for name in [*bench.names, *bench.free(rest)]}
    if prior:
        found["mean-rank"] = gather([prior[i] for i in ids])
    auc_SI = {name: auc(one.cosine_IM) for name, one in found.items()}
    free = best_free({name: auc_SI[name] for name in found if name not in bench.names})
    rows = []
    for name in [UNCACHED, *found]:
        source = EXACT if name == UNCACHED else name
        worth = recovered_headroom(auc_SI[source], auc_SI[free], auc_SI[EXACT])
        rows.append(
            Row(
                strategy=name,
                criterion=bench.plans[rest].job.criterion if source in bench.names else None,
                rest=rest,
                num_images=len(ids),
                **_cost(bench, rest, name, found[source]),
                **_time(rest, name, times),
                auc=worth.auc,
                auc_interval=worth.auc_interval,
                auc_free=auc_SI[free].mean().item(),
                best_free=free,
                auc_exact=auc_SI[EXACT].mean().item(),
                quality=worth.quality,
                quality_interval=worth.quality_interval,
                kendall_tau=found[source].tau_I.mean().item(),
                acc1_at_keep=_at(ACC_KEEPS, found[source].hit_IM),
                cosine_at_keep=_at(CURVE_KEEPS, found[source].cosine_IM),
            )
        )
    _compare(rows)
    return rows


def _cost(bench: Bench, rest: str, name: str, found: Found) -> dict:
    job = bench.plans[rest].job
    if name == UNCACHED:
        macs = uncached_macs(job.tower.config, job.spec)
        return {"macs_per_image": macs, "macs_closed_form": macs}
    closed = cached_macs(job.tower, job.spec) if name == EXACT else None
    macs = 0 if found.macs_I is None else round(found.macs_I.mean().item())
    return {"macs_per_image": macs, "macs_closed_form": closed}


def _time(rest: str, name: str, times: Journal) -> dict:
    kind = "rounds" if name in (UNCACHED, EXACT) else "search"
    taken = seconds_of(times, rest, name, kind)
    full = seconds_of(times, rest, name, "full")
    return {
        "seconds_per_image": torch.tensor(taken, dtype=torch.float64).quantile(0.5).item() if taken else None,
        "seconds_source": SOURCES[kind] if taken else "not timed",
        "seconds_range": (min(taken), max(taken)) if taken else None,
        "seconds_full_image": full[0] if full else None,
        "num_timed": len(taken),
    }


def _at(keeps: tuple[float, ...], value_IM: Tensor | None) -> dict[str, float] | None:
    """Means over the images at some of the curve's keep ratios, by the ratio as text."""
    if value_IM is None:
        return None
    mean_M = value_IM.mean(0).tolist()
    return {f"{keep:g}": mean_M[CURVE_KEEPS.index(keep)] for keep in keeps}


def _compare(rows: list[Row]) -> None:
    """Fill in how much cheaper and faster every search is than the references."""
    references = [row for row in rows if row.strategy in REFERENCES]
    for row in rows:
        for other in references:
            if row.macs_per_image:
                row.times_fewer_macs[other.strategy] = other.macs_per_image / row.macs_per_image
            if row.seconds_per_image and other.seconds_per_image:
                row.times_faster[other.strategy] = other.seconds_per_image / row.seconds_per_image


def dense_acc1(bench: Bench, worths: Journal) -> float | None:
    """Top-1 accuracy of the unpruned tower on the images of any `rest`; None without classes or labels."""
    ids = {item.id for images in bench.images.values() for item in images}
    hits = [worths.get(image_id, "", "dense")["hit"] for image_id in ids]
    return None if None in hits or not hits else sum(hits) / len(hits)


def best_fast(rows: list[Row]) -> Row | None:
    """The search of the highest quality among those that are no greedy elimination."""
    fast = [row for row in rows if row.criterion and not row.strategy.startswith("greedy") and row.quality is not None]
    return max(fast, key=lambda row: row.quality, default=None)
