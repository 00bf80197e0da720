"""Tables of the page, cell by cell: text, colour, and the interval in small print."""

from collections.abc import Sequence

from eval.records import Record
from eval.report_data import SEVEN, Results, speed_of, title_of
from eval.report_lines import Cell, Line, lines_of
from eval.report_reported import ReportedLine
from eval.report_rows import Difference
from eval.report_tables import MARKS, minus, percent, rate, share_text
from eval.rivals import OURS

TABLE_TEXT = (
    "All methods run on the same frozen weights, the same images and the same classifier, at equal image-tower MACs; "
    "the last block of every row, the unpruned one too, computes the class row only. ▲ better, = tie, ▼ worse than "
    "ours by the paired interval; ! misses the budget by more than 1 %, and is held against our interpolated curve."
)
REPORTED_TEXT = (
    "Published numbers are on another backbone (ViT-B/16 CLIP) with other prompts, so levels do not compare; the loss "
    "against each row's own unpruned model does, roughly. Averages are recomputed from the printed cells. The papers' "
    '"GFLOPs" are MACs of the image tower and about two text prompts.'
)
REPORTED_HEAD = ["cost", *(title_of(name) for name in SEVEN), "mean of 7", "lost to own unpruned"]
OTHERS_HEAD = ["data set", "task", "protocol", "method", "MACs %", "images", "metric", "value"]
PROTOCOL_HEAD = [
    "data set",
    "task",
    "protocol",
    "split",
    "images",
    "split hash",
    "image list",
    "class names",
    "prompts",
]


def table_of(results: Results, macs: float) -> dict:
    """All rows of a budget."""
    names, lines = [panel.dataset for panel in results.panels], lines_of(results, macs)
    several = len(names) > 1
    head = ["method", "MACs %", "images/s", *(["mean top-1 %"] if several else []), "to ours, points"]
    head += [*(f"{title_of(name)} %" for name in names), "cosine", "to ours, cosine"]
    dense = [percent(panel.dense.record.metrics["acc1"]) for panel in results.panels]
    mean = [percent(sum(p.dense.record.metrics["acc1"] for p in results.panels) / len(names))] if several else []
    speed = speed_of(results)
    cells = ["100.0", rate(speed["dense_images_per_s"]) if speed else "–", *mean, "", *dense, "1.0000", ""]
    first = {"tone": "dense", "name": "unpruned", "text": "", "oracle": False, "cells": [_cell(text) for text in cells]}
    return {
        "title": f"{100 * macs:g} % of the MACs",
        "text": f"{len(lines)} methods, best first",
        "head": head,
        "rows": [first, *(_table_row(line, names, several) for line in lines)],
    }


def _cell(text: str, tone: str = "", range: str = "") -> dict:
    return {"text": text, "tone": tone, "range": range}


def _table_row(line: Line, names: Sequence[str], several: bool) -> dict:
    mean = line.mean
    speed = _cell("–") if line.images_per_s is None else _cell(rate(line.images_per_s), "", f"×{line.speedup:.2f}")
    cells = [_cell(share_text(line)), speed, *([_cell(percent(mean and mean.acc1))] if several else [])]
    cells += [_to_ours(mean), *(_set_cell(line.cells.get(name)) for name in names)]
    cells += [_cell("–" if mean is None else f"{mean.cosine:.4f}"), _against(mean and mean.cosine_against, 1, 4)]
    tone = "ours" if line.method == OURS else "oracle" if line.is_oracle else ""
    text = f"{line.text}{short_text(line)}"
    return {"tone": tone, "name": line.method, "text": text, "oracle": line.is_oracle, "cells": cells}


def short_text(line: Line) -> str:
    """Which images a row was judged on, where they are fewer than those of the others."""
    short = [cell for cell in line.cells.values() if cell.is_short]
    if not short:
        return ""
    dense = ", ".join(percent(cell.dense_acc1) for cell in short)
    return f"; on the first {short[0].num_images} images, where the unpruned tower has {dense} %"


def _against(against: Difference | None, scale: float, digits: int) -> dict:
    if against is None:
        return _cell("")
    low, high = scale * against.low, scale * against.high
    mean = minus(f"{scale * against.mean:+.{digits}f}")
    bounds = minus(f"[{low:+.{digits}f}, {high:+.{digits}f}]")
    return _cell(f"{mean} {MARKS[against.verdict]}", against.verdict, bounds)


def _to_ours(cell: Cell | None) -> dict:
    if cell is not None and cell.hit_against is None and cell.curve_gain is not None:
        return _cell(minus(f"{100 * cell.curve_gain:+.1f}"), "", "to our curve")
    return _against(cell and cell.hit_against, 100, 1)


def _set_cell(cell: Cell | None) -> dict:
    if cell is None:
        return _cell("–")
    if cell.hit_against is None or cell.is_short:
        return _cell(percent(cell.acc1))
    return _cell(f"{percent(cell.acc1)} {MARKS[cell.hit_against.verdict]}", cell.hit_against.verdict)


def reported_row(one: ReportedLine) -> dict:
    """A row of the table beside the papers."""
    cells = [one.cost, *(f"{one.values[name]:.1f}" if name in one.values else "–" for name in SEVEN)]
    cells += ["–" if one.mean is None else f"{one.mean:.1f}", "" if one.lost is None else minus(f"{-one.lost:+.1f}")]
    tone = "ours" if one.name == OURS else "dense" if one.is_dense else ""
    return {"tone": tone, "name": one.name, "source": one.source, "here": not one.is_reported, "cells": cells}


def other_row(record: Record) -> list[str]:
    """A measurement of another task."""
    budget = f"{100 * record.macs_share:.1f}"
    return [
        title_of(record.dataset),
        record.task,
        record.protocol,
        record.method,
        budget,
        str(record.num_images),
        record.main_metric,
        f"{record.main:.4f}",
    ]


def protocol_row(record: Record) -> list[str]:
    """Split and hashes of a data set."""
    hashes = [record.split_sha256, record.images_sha256, record.classnames_sha256, record.templates_sha256]
    return [
        title_of(record.dataset),
        record.task.replace("_", " "),
        record.protocol,
        f"{record.split} ({record.split_source})",
        f"{record.num_images:,}",
        *("–" if one is None else one[:12] for one in hashes),
    ]
