"""The report's figures: accuracy against speed and against MACs, loss against budget; one panel per data set and the
mean. Each panel draws itself, so that the page shows them apart (SVG) and the folder holds them together (PNG).
"""

import io
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eval.report_rows import front
from eval.report_style import BACKDROP, INK, PAPER, PLAIN_TICKS, SOFT, Look, dress, label_of, looks_of
from eval.rivals import OURS

PANEL_SIZE = (5.6, 3.9)
"""Inches of one panel."""
_BOX = (0.125, 0.145, 0.86, 0.74)
"""Left, bottom, width and height of the axes in a panel, as shares of it."""
_SVG = {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "patchrank"}


@dataclass(frozen=True)
class Point:
    """One row in a figure."""

    method: str
    macs: float
    x: float
    y: float
    text: str
    """What the reader sees when pointing at it."""


@dataclass(frozen=True)
class PanelData:
    """What one panel shows: the unpruned tower and every row."""

    title: str
    dense: Point
    points: list[Point]


Draw = Callable[[Axes, PanelData, dict[str, Look]], None]


def pareto_panel(axes: Axes, data: PanelData, looks: dict[str, Look], *, x_label: str, right_is_better: bool) -> None:
    """Accuracy against a cost or a speed; the broad grey line joins the rows that none beats in both."""
    _marks(axes, data, looks)
    points = [point for point in [data.dense, *data.points] if not _oracle(point.method)]
    kept = front([(point.x if right_is_better else 1 / point.x, point.y) for point in points])
    best = sorted((points[place].x, points[place].y) for place in kept)
    axes.plot(*zip(*best), color=SOFT, linewidth=7, alpha=0.16, solid_joinstyle="round", zorder=1)
    dress(axes, data.title, x_label, "top-1 accuracy (%)")
    if not right_is_better:
        axes.invert_xaxis()
    axes.set_ylim(bottom=max(axes.get_ylim()[0], lowest_shown(data)))
    axes.xaxis.set_major_formatter(PLAIN_TICKS)


def lowest_shown(data: PanelData) -> float:
    """Where an accuracy axis ends: three times as far below the unpruned tower as ours falls, 6 points at least."""
    ours = [data.dense.y - point.y for point in data.points if point.method == OURS]
    return data.dense.y - max(3 * max(ours, default=100.0), 6.0)


def _root(value):
    return np.sign(value) * np.sqrt(np.abs(value))


def _square(value):
    return np.sign(value) * np.square(value)


def loss_panel(axes: Axes, data: PanelData, looks: dict[str, Look], *, y_label: str, ticks: Sequence[float]) -> None:
    """What is lost against the budget, on a square-root axis: zero is the unpruned tower, down is better."""
    _marks(axes, data, looks)
    axes.axhline(0, color=INK, linewidth=1, zorder=1)
    dress(axes, data.title, "image-tower MACs (% of the unpruned)", y_label)
    axes.invert_xaxis()
    losses = [point.y for point in data.points]
    highest, lowest = max(losses + [tick for tick in ticks if tick > 0][:1]), min([0.0, *losses])
    axes.set_yscale("function", functions=(_root, _square))
    axes.set_yticks([tick for tick in ticks if lowest <= tick <= 1.15 * highest])
    axes.set_ylim(1.3 * lowest - 0.002 * highest, 1.15 * highest)
    axes.yaxis.set_major_formatter(PLAIN_TICKS)
    axes.xaxis.set_major_formatter(PLAIN_TICKS)


def _oracle(method: str) -> bool:
    return method.startswith("golden")


def _marks(axes: Axes, data: PanelData, looks: dict[str, Look]) -> None:
    for method in sorted({point.method for point in data.points}, key=lambda name: (looks[name].depth, name)):
        look = looks[method]
        found = sorted((one for one in data.points if one.method == method), key=lambda one: -one.macs)
        line = found if _oracle(method) else [data.dense, *found]
        xs, ys = [point.x for point in line], [point.y for point in line]
        alpha = 0.95 if look.width > 2 else 0.65
        axes.plot(xs, ys, color=look.colour, linestyle=look.line, linewidth=look.width, alpha=alpha, zorder=look.depth)
        edge = look.colour if look.marker in "x." else PAPER
        for point in found:
            (mark,) = axes.plot(
                point.x, point.y, look.marker, color=look.colour, markersize=look.size, zorder=look.depth
            )
            mark.set(markeredgecolor=edge, markeredgewidth=0.8, gid=f"tip:{point.text}")
    (mark,) = axes.plot(data.dense.x, data.dense.y, "o", color=INK, markersize=8, zorder=9)
    mark.set_gid(f"tip:{data.dense.text}")
    place = dict(xytext=(0, 9), textcoords="offset points", ha="center", fontsize=8.5, color=INK, zorder=9)
    axes.annotate("unpruned", (data.dense.x, data.dense.y), **place)
    axes.margins(x=0.07, y=0.13)


def as_svg(draw: Draw, data: PanelData, looks: dict[str, Look], name: str) -> str:
    """One panel as an SVG element with readable text and a tip on every point; `name` says what it shows."""
    with rc_context(_SVG):
        figure = Figure(figsize=PANEL_SIZE)
        draw(figure.add_axes(_BOX), data, looks)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return tidy_svg(file.getvalue(), name)


def tidy_svg(text: str, name: str) -> str:
    """An SVG file as an element for a page: no prolog, fluid width, its own ids, tips as <title>."""
    text = text[text.index("<svg") :]
    text = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace("<svg", f'<svg role="img" aria-label="{escape(name, quote=True)}"', 1)
    slug = re.sub(r"\W+", "-", name)
    text = re.sub(r'id="(?!tip:)([^"]+)"', rf'id="{slug}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{slug}-", text)
    return re.sub(r'<g id="tip:([^"]*)">', r'<g class="tip"><title>\1</title>', text)


def drawn(looks: dict[str, Look], panels: Sequence[PanelData]) -> dict[str, Look]:
    """Looks of the methods that have a point in these panels: a legend names no other."""
    there = {point.method for data in panels for point in data.points}
    return {method: look for method, look in looks.items() if method in there}


def as_png(draw: Draw, panels: Sequence[PanelData], looks: dict[str, Look], title: str, columns: int = 2) -> bytes:
    """All panels on one sheet, with the legend of what they show below."""
    columns = min(columns, len(panels))
    rows, keys = -(-len(panels) // columns), handles(drawn(looks, panels))
    (wide, high), head = PANEL_SIZE, 0.55
    foot = 0.25 + 0.24 * -(-len(keys) // 5)
    whole_wide, whole_high = max(wide * columns, 8.0), head + high * rows + foot
    figure = Figure(figsize=(whole_wide, whole_high))
    FigureCanvasAgg(figure)
    figure.text(0.16 / whole_wide, 1 - 0.12 / whole_high, title, fontsize=14, color=INK, weight="bold", va="top")
    left, bottom, box_wide, box_high = _BOX
    for place, data in enumerate(panels):
        column, row = place % columns, place // columns
        corner = wide * (column + left), whole_high - head - high * (row + 1 - bottom)
        size = wide * box_wide, high * box_high
        draw(figure.add_axes((*_over(corner, figure), *_over(size, figure))), data, looks)
    figure.legend(handles=keys, loc="lower left", ncols=5, fontsize=9, frameon=False, labelcolor=INK)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, facecolor=PAPER, metadata={"Software": None})
    return file.getvalue()


def _over(inches: tuple[float, float], figure: Figure) -> tuple[float, float]:
    """A length in inches as a share of the figure."""
    width, height = figure.get_size_inches()
    return inches[0] / width, inches[1] / height


def handles(looks: dict[str, Look]) -> list[Line2D]:
    """One line and marker per method; methods without a colour share one."""
    found = [_handle(label_of(method), look) for method, look in looks.items() if look.colour != BACKDROP]
    if len(found) < len(looks):
        found.append(_handle("other methods", looks_of(["-"])["-"]))
    return found


def _handle(label: str, look: Look) -> Line2D:
    style = dict(color=look.colour, marker=look.marker, linestyle=look.line, linewidth=look.width)
    return Line2D([], [], label=label, markersize=min(look.size, 8), **style)


def legend_svg(looks: dict[str, Look]) -> list[tuple[str, str]]:
    """(name, small SVG file of its line and marker) for the page's own legends; each needs `tidy_svg` for its ids."""
    found = []
    for handle in handles(looks):
        with rc_context(_SVG):
            figure = Figure(figsize=(0.42, 0.16))
            axes = figure.add_axes((0, 0, 1, 1))
            axes.set_axis_off()
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1)
            axes.plot(
                [0.02, 0.98],
                [0.5, 0.5],
                color=handle.get_color(),
                linestyle=handle.get_linestyle(),
                linewidth=handle.get_linewidth(),
            )
            axes.plot([0.5], [0.5], handle.get_marker(), color=handle.get_color(), markersize=handle.get_markersize())
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        found.append((handle.get_label(), file.getvalue()))
    return found


def all_looks(methods: Sequence[str], strongest: Collection[str], shown: Collection[str]) -> dict[str, Look]:
    """Looks of all methods of a report, ours first; see `looks_of`."""
    order = sorted(methods, key=lambda name: (name != OURS, not name.startswith(OURS), name not in strongest))
    return looks_of(order, strongest, shown)
