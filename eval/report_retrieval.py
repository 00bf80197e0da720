"""Retrieval in a report: recall of every method both ways, and what it gains or loses on the same images."""

from collections.abc import Sequence

from eval.report_data import Results, title_of
from eval.report_rows import Difference, Measured, Panel, difference, misses_budget, share_of
from eval.report_tables import MARKS, minus, percent, signed
from eval.retrieval import IMAGE, TEXT
from eval.rivals import OURS
from eval.tables import as_csv

WAYS = {IMAGE: "text to image", TEXT: "image to text"}
"""Name of the metric -> what is asked for what."""
RETRIEVAL_TEXT = (
    "Share of the captions that find their image among the first k, and of the images that find one of their captions. "
    "Differences are paired over images, with 95 % bootstrap intervals; an image counts by the share of its captions "
    f"that find it. {MARKS['better']} better, {MARKS['tie']} tie, {MARKS['worse']} worse by the interval."
)


def ks_of(panel: Panel) -> list[int]:
    """The k of recall@k that were measured, rising."""
    return sorted(panel.dense.record.settings["recall"])


def head_k(panel: Panel) -> int:
    """The k whose differences are shown: that of the headline metric."""
    return int(panel.dense.record.main_metric.rpartition("@")[2])


def title_of_panel(panel: Panel) -> str:
    """Data set, split and how many images."""
    return f"{title_of(panel.dataset)}, {panel.num_images:,} {panel.dense.record.split} images"


def retrieval_head(panel: Panel) -> list[str]:
    """Columns of `retrieval_lines`."""
    ks, k = " / ".join(map(str, ks_of(panel))), head_k(panel)
    own = [[f"{words} @ {ks}, %", f"@{k} to unpruned", f"@{k} to ours"] for words in WAYS.values()]
    return ["method", "MACs %", *own[0], *own[1], "cosine"]


def retrieval_lines(panel: Panel, macs: float) -> list[list[str]]:
    """Cells of one budget, the unpruned tower first, then by the sum of both recalls, best first."""
    rows = [row for (_, budget), row in panel.rows.items() if budget == macs]
    names = [way.format(head_k(panel)) for way in WAYS]
    rows.sort(key=lambda row: -sum(row.record.metrics[name] for name in names))
    return [_cells(panel, panel.dense, None), *(_cells(panel, row, panel.rows.get((OURS, macs))) for row in rows)]


def _cells(panel: Panel, row: Measured, ours: Measured | None) -> list[str]:
    record, is_dense = row.record, row is panel.dense
    cells = ["unpruned" if is_dense else record.method]
    cells.append(f"{100 * share_of(record):.1f}{' !' if misses_budget(record) else ''}")
    for way in WAYS:
        name = way.format(head_k(panel))
        cells.append(" / ".join(percent(record.metrics[way.format(k)]) for k in ks_of(panel)))
        cells.append("" if is_dense else minus(signed(difference([(row, panel.dense)], name))))
        fair = ours is not None and row is not ours and not misses_budget(record)
        cells.append(minus(signed(difference([(row, ours)], name))) if fair else "")
    return [*cells, f"{record.metrics['cosine']:.4f}"]


def retrieval_csv(all_results: Sequence[Results]) -> str:
    """One row per data set, method, budget and metric; fractions, paired differences to unpruned and to ours."""
    rows = []
    for results in all_results:
        for panel in results.retrieval:
            for (method, macs), row in panel.rows.items():
                rows += [_csv_row(results, panel, method, macs, row, name) for name in _names(panel)]
    return as_csv(rows)


def _names(panel: Panel) -> list[str]:
    return [way.format(k) for way in WAYS for k in ks_of(panel)]


def _csv_row(results: Results, panel: Panel, method: str, macs: float, row: Measured, name: str) -> dict:
    cells = {"model": results.model, "dataset": panel.dataset, "method": method, "budget": macs}
    cells |= {"macs_share": share_of(row.record), "image_macs": row.record.image_macs, "num_images": panel.num_images}
    cells |= {"metric": name, "value": row.record.metrics[name], "dense_value": panel.dense.record.metrics[name]}
    cells |= _said("dense", difference([(row, panel.dense)], name))
    ours = panel.rows.get((OURS, macs))
    return cells | (_said("ours", difference([(row, ours)], name)) if ours is not None and row is not ours else {})


def _said(other: str, against: Difference) -> dict:
    bounds = {f"minus_{other}_low": against.low, f"minus_{other}_high": against.high}
    return {f"minus_{other}": against.mean, **bounds, f"verdict_to_{other}": against.verdict}
