"""The report's numbers as CSV, and as cells of print: what Markdown and the page share."""

from eval.report_data import Results, title_of
from eval.report_lines import Cell, Line, lines_of
from eval.report_rows import Difference
from eval.rivals import OURS
from eval.tables import as_csv, as_markdown

MEAN = "mean"
MARKS = {"better": "▲", "tie": "=", "worse": "▼"}
"""What a row is to ours, where the interval of the paired difference says so."""


def csv_of(results: Results) -> str:
    """One row per data set (and the mean), method and budget; fractions, intervals and costs in full."""
    rows = []
    for macs in results.budgets:
        for line in lines_of(results, macs):
            cells = dict(line.cells) | ({MEAN: line.mean} if line.mean and len(results.panels) > 1 else {})
            rows += [_csv_row(results, line, name, cell) for name, cell in cells.items()]
    return as_csv(rows)


def _csv_row(results: Results, line: Line, name: str, cell: Cell) -> dict:
    row = {
        "model": results.model,
        "dataset": name,
        "method": line.method,
        "budget": line.macs,
        "macs_share": line.share,
        "image_macs": line.image_macs,
        "dense_macs": results.dense_macs,
        "misses_budget": line.misses,
        "num_images": cell.num_images,
        "acc1": cell.acc1,
        "acc5": cell.acc5,
        "mean_per_class_recall": cell.mean_per_class,
        "cosine": cell.cosine,
        "dense_acc1": cell.dense_acc1,
        "acc1_minus_our_curve": cell.curve_gain,
    }
    for runtime, speed in line.speeds.items():
        low, high = speed["speedup_quartiles"]
        row |= {f"images_per_s {runtime}": speed["images_per_s"], f"speedup {runtime}": speed["speedup"]}
        row |= {f"speedup_quartile_low {runtime}": low, f"speedup_quartile_high {runtime}": high}
    for label, against in (("acc1", cell.hit_against), ("cosine", cell.cosine_against)):
        if against is not None:
            row |= {f"{label}_minus_ours": against.mean, f"{label}_minus_ours_low": against.low}
            row |= {f"{label}_minus_ours_high": against.high, f"{label}_verdict": against.verdict}
    return {key: value for key, value in row.items() if value is not None}


def minus(text: str) -> str:
    """A proper minus sign for print."""
    return text.replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent; a dash for none."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def signed(against: Difference | None, scale: float = 100, digits: int = 1) -> str:
    """`-1.2 [-2.3, -0.1] ▼`."""
    if against is None:
        return "–"
    low, mean, high = (scale * value for value in (against.low, against.mean, against.high))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] {MARKS[against.verdict]}"


def share_text(line: Line) -> str:
    """MACs really spent in percent, ! where the budget is missed."""
    return f"{100 * line.share:.1f}{' !' if line.misses else ''}"


def speed_text(line: Line) -> str:
    """`123 (×1.31)`."""
    return "–" if line.images_per_s is None else f"{rate(line.images_per_s)} (×{line.speedup:.2f})"


def rate(images_per_s: float) -> str:
    """Images per second with three digits or more."""
    return f"{images_per_s:.1f}" if images_per_s < 100 else f"{images_per_s:,.0f}"


def markdown_of(results: Results, macs: float) -> str:
    """The table of one budget."""
    names = [panel.dataset for panel in results.panels]
    several = len(names) > 1
    head = ["method", "MACs %", "images/s", *(["mean top-1 %"] if several else []), "to ours"]
    head += [*(f"{title_of(name)} %" for name in names), "cosine", "to ours"]
    return as_markdown(head, [_markdown_cells(line, names, several) for line in lines_of(results, macs)])


def _markdown_cells(line: Line, names: list[str], several: bool) -> list[str]:
    mean = line.mean
    cells = [f"**{line.method}**" if line.method == OURS else line.method, share_text(line), speed_text(line)]
    cells += [percent(mean and mean.acc1)] if several else []
    cells.append(_to_ours(mean))
    cells += [_set_cell(line.cells.get(name)) for name in names]
    return [*cells, "–" if mean is None else f"{mean.cosine:.4f}", signed(mean and mean.cosine_against, 1, 4)]


def _to_ours(cell: Cell | None) -> str:
    if cell is not None and cell.hit_against is None and cell.curve_gain is not None:
        return f"{100 * cell.curve_gain:+.1f} to our curve"
    return signed(cell and cell.hit_against)


def _set_cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    return percent(cell.acc1) + (f" {MARKS[cell.hit_against.verdict]}" if cell.hit_against else "")
