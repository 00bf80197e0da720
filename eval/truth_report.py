"""What `search-truth` leaves: search_truth.json, the same rows as CSV and Markdown, and one picture."""

import io
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.tables import as_csv, as_markdown, as_text, flat
from eval.truth_rows import TruthRow, bend, peak, wins
from patchrank.atomic import write_bytes, write_json, write_text
from patchrank.search.pictures import FAINT, GOLD, GREY, INK, SOFT, TEAL

_COLOURS = {"label": GOLD, "preservation": TEAL, "confidence": "#1d4ed8"}
_DASHES = {"sweep": (0, (4, 2)), "random": (0, (1, 2)), "checkerboard": (0, (4, 2))}
_EXACT = (0, (6, 2, 1, 2))
"""Dashes of the greedy rows."""


def write_report(folder: Path, origin: dict, rows: list[TruthRow]) -> None:
    """Write all four files. Args: origin: command, versions and other fields of the JSON."""
    found = {"bends_at_keep": {name_of(row): bend(row) for row in rows if row.criterion}}
    write_json(folder / "search_truth.json", origin | {"rows": [asdict(row) for row in rows]} | found)
    write_text(folder / "search_truth.csv", as_csv([flat(row) for row in rows]))
    tables = "\n\n".join(f"**{rest}**\n\n{as_markdown(*table(part))}" for rest, part in by_rest(rows).items())
    said = "\n".join(f"* {line}" for line in sentences(rows))
    write_text(folder / "search_truth.md", f"`{origin['command']}`\n\n{tables}\n\n{NOTE}\n\n{said}\n")
    write_bytes(folder / "search_truth.png", draw(rows))


NOTE = (
    "Top-1 accuracy in percent when the first patches of each order are kept; in brackets the 95 % paired bootstrap "
    "interval of the difference to the unpruned tower on the same images. `label` reads the answer: an oracle."
)


def name_of(row: TruthRow) -> str:
    """How a row is called in tables: strategy and criterion, and the `rest`."""
    return f"{label_of(row)} ({row.rest})"


def label_of(row: TruthRow) -> str:
    """Strategy and criterion."""
    return row.strategy if row.criterion is None else f"{row.strategy} {row.criterion}"


def by_rest(rows: list[TruthRow]) -> dict[str, list[TruthRow]]:
    """Rows grouped by `rest`."""
    return {rest: [row for row in rows if row.rest == rest] for rest in dict.fromkeys(row.rest for row in rows)}


def table(rows: list[TruthRow]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of one `rest`."""
    head = ["ranking", "images", *(f"keep {keep}" for keep in rows[0].acc1_at_keep)]
    return head, [[label_of(row), str(row.num_images), *_accuracies(row)] for row in rows]


def _accuracies(row: TruthRow) -> list[str]:
    cells = []
    for keep, acc1 in row.acc1_at_keep.items():
        low, high = (100 * value for value in row.minus_dense_interval_at_keep[keep])
        cells.append(f"{100 * acc1:.1f}" + ("" if keep == "1" else f" [{low:+.1f}, {high:+.1f}]"))
    return cells


def text_table(rows: list[TruthRow]) -> str:
    """All tables and what they say, for a terminal."""
    parts = [f"{rest}\n{as_text(*table(part))}" for rest, part in by_rest(rows).items()]
    return "\n\n".join([*parts, NOTE, *sentences(rows)])


def sentences(rows: list[TruthRow]) -> list[str]:
    """What the numbers say, one line per searched ranking: above dense, where it bends, against the checkerboard."""
    return [f"{name_of(row)}: {_peak_of(row)}; {_bend_of(row)}; {_wins_of(row)}" for row in rows if row.criterion]


def _peak_of(row: TruthRow) -> str:
    keep = peak(row)
    gain = 100 * row.minus_dense_at_keep[keep]
    if gain <= 0:
        return "never above the unpruned tower"
    low, high = (100 * value for value in row.minus_dense_interval_at_keep[keep])
    oracle = " (an oracle)" if row.criterion == "label" else ""
    return f"at most {gain:+.1f} points [{low:+.1f}, {high:+.1f}] over the unpruned tower, at keep {keep}{oracle}"


def _bend_of(row: TruthRow) -> str:
    keep = bend(row)
    lowest = list(row.acc1_at_keep)[-1]
    return f"not clearly below it down to keep {lowest}" if keep is None else f"clearly below it from keep {keep:g}"


def _wins_of(row: TruthRow) -> str:
    keeps = wins(row)
    return "nowhere clearly better than checkerboard" if not keeps else f"beats checkerboard at keep {', '.join(keeps)}"


def draw(rows: list[TruthRow]) -> bytes:
    """PNG: points above or below the unpruned tower on each row's own images, by keep ratio; one panel per `rest`."""
    groups = by_rest(rows)
    figure = Figure(figsize=(7.2 * len(groups), 5.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for one, (rest, part) in zip(axes, groups.items()):
        _draw_rest(one, rest, part)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_rest(axes: Axes, rest: str, rows: list[TruthRow]) -> None:
    for row in rows:
        keeps = [float(keep) for keep in row.acc1_at_keep]
        values = [100 * value for value in row.minus_dense_at_keep.values()]
        colour = GREY if row.criterion is None else _COLOURS[row.criterion]
        dashes = _EXACT if row.strategy.startswith("greedy") else _DASHES.get(row.strategy, "solid")
        label = f"{label_of(row)} ({row.num_images})"
        axes.plot(keeps, values, marker="o", markersize=3, color=colour, linestyle=dashes, label=label)
        band = ([100 * value for value in end] for end in zip(*row.minus_dense_interval_at_keep.values()))
        if row.criterion is not None:
            axes.fill_between(keeps, *band, color=colour, alpha=0.08, linewidth=0)
    axes.axhline(0.0, color=SOFT, linewidth=1, zorder=0)
    axes.set_xlim(1.0, min(keeps))
    axes.set_xlabel("share of patches kept", fontsize=9, color=SOFT)
    axes.set_ylabel("points of top-1 to the unpruned tower", fontsize=9, color=SOFT)
    axes.set_title(f"accuracy on golden keep sets ({rest})", fontsize=10.5, color=INK)
    legend = {"loc": "lower left", "handlelength": 4, "title": "ranking (images)", "title_fontsize": 8}
    axes.legend(fontsize=8, frameon=False, **legend)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.tick_params(labelsize=9, colors=SOFT, length=0)
    for name, side in axes.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color(FAINT)
