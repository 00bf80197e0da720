"""What `search-cost` leaves: search_cost.json, the same rows as CSV and Markdown, and one picture."""

import io
import math
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.cost_rows import REFERENCES, Row, best_fast
from eval.tables import as_csv, as_markdown, as_text, flat
from patchrank.atomic import write_bytes, write_json, write_text
from patchrank.search.pictures import FAINT, GOLD, GREY, INK, SOFT, TEAL

_COLOURS = {"greedy-1": "#1e3a8a", "greedy-1-uncached": "#1e3a8a", "greedy-8": "#2563eb", "greedy-16-decay": "#60a5fa"}
_COLOURS |= {"sweep": "#7c3aed", "joint": "#dc2626", "gradient": GOLD, "evolve": TEAL, "regression": "#be185d"}
_COLOURS |= {"random": "#9aa1ad", "checkerboard": "#84cc16", "suppress": "#a16207", "class-attention": "#38bdf8"}
_COLOURS |= {"centre": "#cbd5e1", "token-norm": "#d8b4fe", "mean-rank": "#fca5a5"}


def write_report(folder: Path, origin: dict, rows: list[Row]) -> None:
    """Write all four files. Args: origin: command, versions, threads, number of images and other fields of the JSON."""
    write_json(folder / "search_cost.json", origin | {"rows": [asdict(row) for row in rows]})
    write_text(folder / "search_cost.csv", as_csv([flat(row) for row in rows]))
    heading = f"`{origin['command']}`, {origin['threads']} thread(s), {origin['machine']['processor']}"
    write_text(folder / "search_cost.md", f"{heading}\n\n{markdown(rows)}\n")
    write_bytes(folder / "search_cost.png", draw(rows))


def _cells(row: Row) -> list[str]:
    acc1 = row.acc1_at_keep
    low_high = "" if row.quality_interval is None else " [{:.2f}, {:.2f}]".format(*row.quality_interval)
    return [
        row.strategy,
        f"{row.macs_per_image / 1e9:.1f}",
        "-" if row.seconds_per_image is None else f"{row.seconds_per_image:.3g}{'*' * _is_extrapolated(row)}",
        *(_times(row.times_fewer_macs.get(name)) for name in REFERENCES),
        *(_times(row.times_faster.get(name)) for name in REFERENCES),
        f"{row.auc:.4f}",
        "-" if row.quality is None else f"{row.quality:.3f}{low_high}",
        f"{row.kendall_tau:.2f}",
        "-" if acc1 is None else " / ".join(f"{100 * value:.1f}" for value in acc1.values()),
    ]


def _is_extrapolated(row: Row) -> bool:
    return row.seconds_source == "extrapolated"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3g}x"


_SHORT = ("uncached", "cached", "m=8")
_HEAD = ["ranking", "GMAC", "s", *(f"MACs / {name}" for name in _SHORT), *(f"time / {name}" for name in _SHORT)]
_HEAD += ["AUC", "quality [95 %]", "tau", "top-1 % at 0.8 / 0.6 / 0.4"]


def _title(rows: list[Row]) -> str:
    first = rows[0]
    return (
        f"{first.rest}: {first.num_images} images, AUC of exact greedy {first.auc_exact:.4f}, "
        f"best free {first.auc_free:.4f} ({first.best_free})"
    )


NOTE = (
    "GMAC and seconds per image (1 MAC = 2 FLOP, a backward pass counts as two forwards; seconds from pixels to order, "
    "median). Ratios: how many times fewer MACs and less time than exact greedy uncached, cached, and greedy m=8. "
    "* extrapolated from every 16th round. AUC: mean cosine to the unpruned feature over keep 0.30 to 0.70. "
    "Quality: recovered headroom, 0 = best free scorer, 1 = exact greedy; 95 % paired bootstrap over images."
)


def by_rest(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows grouped by `rest`, in order."""
    return {rest: [row for row in rows if row.rest == rest] for rest in dict.fromkeys(row.rest for row in rows)}


def markdown(rows: list[Row]) -> str:
    """One table per `rest`, and what its columns mean."""
    parts = []
    for part in by_rest(rows).values():
        parts += [f"**{_title(part)}**", as_markdown(_HEAD, [_cells(row) for row in part]), headline(part)]
    return "\n\n".join([*parts, NOTE])


def text_table(rows: list[Row]) -> str:
    """The same for a terminal."""
    parts = [
        "\n".join([_title(part), as_text(_HEAD, [_cells(row) for row in part]), headline(part)])
        for part in by_rest(rows).values()
    ]
    return "\n\n".join([*parts, NOTE])


def headline(rows: list[Row]) -> str:
    """The best fast search of one `rest` in one sentence."""
    best = best_fast(rows)
    if best is None:
        return f"{rows[0].rest}: exact greedy is no better than the best free scorer here, so there is no quality"
    ratios = [f"{_times(ratio)} fewer MACs than {name}" for name, ratio in best.times_fewer_macs.items()]
    ratios += [f"{_times(ratio)} less time than {name}" for name, ratio in best.times_faster.items()]
    low, high = best.quality_interval
    return f"{best.rest}: {best.strategy} has quality {best.quality:.3f} [{low:.3f}, {high:.3f}]: {', '.join(ratios)}"


def draw(rows: list[Row]) -> bytes:
    """PNG: above quality against MACs, below the deletion curves; one column per `rest`."""
    groups = by_rest(rows)
    figure = Figure(figsize=(7.2 * len(groups), 9.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(groups), squeeze=False)
    for column, part in enumerate(groups.values()):
        _draw_quality(axes[0, column], part)
        _draw_curves(axes[1, column], part)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _colour(name: str) -> str:
    return _COLOURS.get(name, GREY)


def _bare(axes: Axes) -> None:
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=SOFT, length=0)
    for name, side in axes.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color(FAINT)


def _draw_quality(axes: Axes, rows: list[Row]) -> None:
    searched = [row for row in rows if row.macs_per_image and row.quality is not None]
    axes.set_xscale("log")
    for row in searched:
        x, (low, high) = row.macs_per_image / 1e9, row.quality_interval
        reach = [[max(0, row.quality - low)], [max(0, high - row.quality)]]
        axes.errorbar([x], [row.quality], reach, fmt="o", color=_colour(row.strategy), capsize=3)
    axes.margins(x=0.24, y=0.12)
    for level, label in ((1.0, "exact greedy"), (0.0, f"best free: {rows[0].best_free}")):
        axes.axhline(level, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(label, (0.01, level), xycoords=("axes fraction", "data"), fontsize=8.5, color=SOFT, va="bottom")
    _label(axes, searched)
    axes.set_xlabel("GMAC per image (log scale)", fontsize=9, color=SOFT)
    axes.set_ylabel("quality (recovered headroom)", fontsize=9, color=SOFT)
    axes.set_title(_title(rows), fontsize=10, color=INK)
    _bare(axes)


def _label(axes: Axes, rows: list[Row]) -> None:
    """Names to the right of the points, pushed down where one would lie on another."""
    low, high = axes.get_ylim()
    placed: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: -row.quality):
        x, y = row.macs_per_image / 1e9, row.quality + 0.03 * (high - low)
        while any(
            abs(math.log10(x / other)) < 0.7 and abs(y - level) < 0.045 * (high - low) for other, level in placed
        ):
            y -= 0.01 * (high - low)
        placed.append((x, y))
        axes.annotate(row.strategy, (x, y), (8, 0), textcoords="offset points", fontsize=9, color=_colour(row.strategy))


def _draw_curves(axes: Axes, rows: list[Row]) -> None:
    for row in rows[1:]:  # the first is exact greedy uncached: the same curve as cached
        keeps, values = [float(keep) for keep in row.cosine_at_keep], list(row.cosine_at_keep.values())
        searched = row.criterion is not None
        style = {"linewidth": 1.8} if searched else {"linewidth": 1.3, "linestyle": (0, (3, 2))}
        style["color"] = _colour(row.strategy)
        axes.plot(keeps, values, marker="o" if searched else None, markersize=3, label=row.strategy, **style)
    axes.set_xlim(0.9, 0.1)
    axes.set_xlabel("share of patches kept", fontsize=9, color=SOFT)
    axes.set_ylabel(f"cosine to the unpruned feature ({rows[0].rest})", fontsize=9, color=SOFT)
    axes.legend(fontsize=8, frameon=False, loc="lower left", ncols=2)
    _bare(axes)
