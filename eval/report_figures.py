"""From results to the panels of the figures: which point stands where, and what it says when pointed at."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from eval.records import DENSE
from eval.report_data import TORCH, Results, runtimes_of, speed_of, title_of
from eval.report_lines import Cell, Line, lines_of
from eval.report_plots import Draw, PanelData, Point, loss_panel, pareto_panel

MEAN_TITLE = "Mean over the data sets"


@dataclass(frozen=True, kw_only=True)
class FigureOf:
    """One figure of the report: panels and how each is drawn."""

    name: str
    """Part of file names."""
    title: str
    text: str
    panels: list[PanelData]
    draw: Draw


def figures_of(results: Results) -> list[FigureOf]:
    """Accuracy against measured speed (where there is one), against MACs, and the losses against the budget."""
    lines = {macs: lines_of(results, macs) for macs in results.budgets}
    found = [_speed_figure(results, lines, runtime) for runtime in runtimes_of(results)]
    found.append(
        FigureOf(
            name="macs",
            title="Accuracy against compute",
            text="Up and to the right is better: the axis runs from dear to cheap. MACs are those of the image tower "
            "alone (1 MAC = 2 FLOP), each method's own overhead included.",
            panels=_panels(results, lines, None, lambda line: line.image_macs / 1e9, results.dense_macs / 1e9, "GMAC"),
            draw=partial(pareto_panel, x_label="GMAC per image", right_is_better=False),
        )
    )
    found.append(
        FigureOf(
            name="loss",
            title="What is lost at each budget: answers",
            text="Points of top-1 accuracy lost against the unpruned tower on the same images; lower is better, below "
            "zero is a gain. The axis is a square root, so that small losses stay apart.",
            panels=_panels(
                results,
                lines,
                lambda cell: 100 * (cell.dense_acc1 - cell.acc1),
                lambda line: 100 * line.share,
                100.0,
                "% of the MACs",
                dense_y=0.0,
            ),
            draw=partial(
                loss_panel, y_label="top-1 lost (points)", ticks=(-10, -5, -2, 0, 1, 2, 5, 10, 15, 20, 30, 40, 60, 80)
            ),
        )
    )
    found.append(
        FigureOf(
            name="cosine",
            title="What is lost at each budget: features",
            text="One minus the cosine to the unpruned feature, mean over the images; lower is better. Finer than "
            "accuracy: every image counts, not only those whose answer flips. The axis is a square root.",
            panels=_panels(
                results,
                lines,
                lambda cell: 1 - cell.cosine,
                lambda line: 100 * line.share,
                100.0,
                "% of the MACs",
                dense_y=0.0,
                digits=4,
            ),
            draw=partial(
                loss_panel, y_label="1 − cosine", ticks=(0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
            ),
        )
    )
    return found


def _speed_figure(results: Results, lines: dict[float, list[Line]], runtime: str) -> FigureOf:
    speed = speed_of(results, runtime)
    where = f"{runtime}, {speed['device']}, {_threads(speed['threads'])}, batch {speed['batch']}"
    x_of = lambda line: line.speeds.get(runtime, {}).get("images_per_s")  # noqa: E731
    return FigureOf(
        name="speed" if runtime == TORCH else f"speed_{runtime}",
        title="Accuracy against measured speed" + ("" if runtime == TORCH else f": {runtime}"),
        text=f"Up and to the right is better. Measured with {where}, {speed['precision']}; the broad grey line joins "
        "the rows that no other beats in both. Rows far below ours leave the picture; they are in the tables.",
        panels=_panels(results, lines, None, x_of, speed["dense_images_per_s"], "images/s"),
        draw=partial(pareto_panel, x_label=f"images/s ({where})", right_is_better=True),
    )


def _threads(num: int) -> str:
    return "1 thread" if num == 1 else f"{num} threads"


def _panels(
    results: Results,
    lines: dict[float, list[Line]],
    y_of: Callable[[Cell], float] | None,
    x_of: Callable[[Line], float | None],
    dense_x: float,
    unit: str,
    *,
    dense_y: float | None = None,
    digits: int = 1,
) -> list[PanelData]:
    """A panel for the mean where there are several data sets, then one for each.

    Args: y_of: None for accuracy in percent; a row on fewer images (an oracle) is then drawn at its distance to the
    unpruned tower on its own images.
    """
    panels = []
    if len(results.panels) > 1:
        mean = sum(panel.dense.record.metrics["acc1"] for panel in results.panels) / len(results.panels)
        cells = {macs: [(line, line.mean) for line in found if line.mean] for macs, found in lines.items()}
        y = 100 * mean if dense_y is None else dense_y
        found = _panel(MEAN_TITLE, cells, y_of or _accuracy(y), x_of, dense_x, y, unit, digits)
        panels += [found] if found.points else []
    for panel in results.panels:
        cells = {
            macs: [(line, line.cells[panel.dataset]) for line in found if panel.dataset in line.cells]
            for macs, found in lines.items()
        }
        y = 100 * panel.dense.record.metrics["acc1"] if dense_y is None else dense_y
        title = f"{title_of(panel.dataset)} ({panel.num_images:,} images)"
        panels.append(_panel(title, cells, y_of or _accuracy(y), x_of, dense_x, y, unit, digits))
    return panels


def _accuracy(dense_y: float) -> Callable[[Cell], float]:
    return lambda cell: dense_y + 100 * (cell.acc1 - cell.dense_acc1)


def _panel(
    title: str,
    cells: dict[float, list[tuple[Line, Cell]]],
    y_of: Callable[[Cell], float],
    x_of: Callable[[Line], float | None],
    dense_x: float,
    dense_y: float,
    unit: str,
    digits: int,
) -> PanelData:
    points = []
    for macs, found in cells.items():
        for line, cell in found:
            x, y = x_of(line), y_of(cell)
            if x is not None:
                text = f"{line.method} at {100 * macs:g} %: {y:.{digits}f}, {x:.3g} {unit}, {cell.num_images} images"
                points.append(Point(line.method, macs, x, y, text))
    text = f"unpruned: {dense_y:.{digits}f}, {dense_x:.3g} {unit}"
    return PanelData(title, Point(DENSE, 1.0, dense_x, dense_y, text), points)
