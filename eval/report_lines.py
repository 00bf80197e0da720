"""Lines of the report's tables: every method at every budget, its accuracy on each data set and over all, its speed,
and the paired difference to our method; and the sentences that sum them up.
"""

from dataclasses import dataclass, field

from eval.report_data import TORCH, Results, runtimes_of, speed_of, title_of
from eval.report_rows import (
    BETTER,
    WORSE,
    Difference,
    Measured,
    Panel,
    curve_of,
    difference,
    interpolated,
    misses_budget,
    share_of,
)
from eval.report_style import family_of
from eval.rivals import OURS

HIT, COSINE = "correct", "cosine"
"""Names in the side files."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method at one budget on one data set, or over all of them. Fractions in [0, 1]."""

    acc1: float
    cosine: float
    acc5: float | None = None
    mean_per_class: float | None = None
    num_images: int
    is_short: bool = False
    """Judged on fewer images than the other rows."""
    dense_acc1: float
    """Of the unpruned tower on the same images."""
    hit_against: Difference | None = None
    """To ours at the same budget; None in our own line, and where the costs differ."""
    cosine_against: Difference | None = None
    curve_gain: float | None = None
    """Accuracy minus our interpolated curve at the MACs really spent, where the budget is missed."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table of a budget."""

    method: str
    macs: float
    text: str
    share: float
    """MACs really spent, over the dense ones."""
    image_macs: int
    misses: bool
    is_oracle: bool
    cells: dict[str, Cell]
    mean: Cell | None
    """Over all data sets; None if one of them lacks the row or has it on fewer images."""
    speeds: dict[str, dict] = field(default_factory=dict)
    """Runtime -> the row of its throughput file."""

    @property
    def speedup(self) -> float | None:
        """In PyTorch, over the unpruned tower."""
        return self.speeds.get(TORCH, {}).get("speedup")

    @property
    def images_per_s(self) -> float | None:
        """In PyTorch."""
        return self.speeds.get(TORCH, {}).get("images_per_s")


def is_oracle(method: str) -> bool:
    """Rankings that look at the feature of the unpruned tower: a bound, no method."""
    return method.startswith("golden")


def lines_of(results: Results, macs: float) -> list[Line]:
    """All lines of a budget, highest mean accuracy first, oracles last; computed once."""
    key = ("lines", macs)
    if key not in results.memo:
        results.memo[key] = _lines(results, macs)
    return results.memo[key]


def _lines(results: Results, macs: float) -> list[Line]:
    speeds = {runtime: speeds_of(results, runtime) for runtime in runtimes_of(results)}
    lines = []
    for method in results.methods:
        found = {panel.dataset: row for panel in results.panels if (row := _row(panel, (method, macs))) is not None}
        if not found:
            continue
        record = next(iter(found.values())).record
        cells = {
            panel.dataset: _cell(panel, found[panel.dataset], macs)
            for panel in results.panels
            if panel.dataset in found
        }
        lines.append(
            Line(
                method=method,
                macs=macs,
                text=results.text_of(method),
                share=share_of(record),
                image_macs=record.image_macs,
                misses=misses_budget(record),
                is_oracle=is_oracle(method),
                cells=cells,
                mean=_mean_cell(results.panels, method, macs, cells),
                speeds={name: rows[method, macs] for name, rows in speeds.items() if (method, macs) in rows},
            )
        )
    return sorted(lines, key=lambda line: (line.is_oracle, -_score(line)))


def _score(line: Line) -> float:
    return line.mean.acc1 if line.mean else min(cell.acc1 for cell in line.cells.values()) - 1


def _row(panel: Panel, key: tuple[str, float]) -> Measured | None:
    return panel.rows.get(key) or panel.shorter.get(key)


def speeds_of(results: Results, runtime: str) -> dict[tuple[str, float], dict]:
    """(method, budget) -> its row of the throughput file of a runtime."""
    found = speed_of(results, runtime)
    return {} if found is None else {(row["method"], row["macs"]): row for row in found["rows"]}


def _comparable(row: Measured, ours: Measured | None) -> bool:
    return ours is not None and row.record.method != OURS and not misses_budget(row.record)


def _cell(panel: Panel, row: Measured, macs: float) -> Cell:
    record, ours = row.record, panel.rows.get((OURS, macs))
    fair = _comparable(row, ours)
    gain = None
    if misses_budget(record):
        there = interpolated(curve_of(panel, OURS, "acc1"), share_of(record))
        gain = None if there is None else record.metrics["acc1"] - there
    hit_I = dict(zip(panel.dense.sides["ids"].tolist(), panel.dense.sides[HIT].tolist()))
    ids = row.sides["ids"].tolist()
    return Cell(
        acc1=record.metrics["acc1"],
        cosine=record.metrics["cosine"],
        acc5=record.metrics.get("acc5"),
        mean_per_class=record.metrics.get("mean_per_class_recall"),
        num_images=record.num_images,
        is_short=record.num_images < panel.num_images,
        dense_acc1=sum(hit_I[one] for one in ids) / len(ids),
        hit_against=difference([(row, ours)], HIT) if fair else None,
        cosine_against=difference([(row, ours)], COSINE) if fair else None,
        curve_gain=gain,
    )


def _mean_cell(panels: list[Panel], method: str, macs: float, cells: dict[str, Cell]) -> Cell | None:
    key = (method, macs)
    if any(key not in panel.rows for panel in panels):
        return None
    pairs = [(panel.rows[key], ours) for panel in panels if (ours := panel.rows.get((OURS, macs))) is not None]
    fair = len(pairs) == len(panels) and all(_comparable(*pair) for pair in pairs)
    mean = lambda name: sum(getattr(cell, name) for cell in cells.values()) / len(cells)  # noqa: E731
    gains = [cell.curve_gain for cell in cells.values()]
    return Cell(
        acc1=mean("acc1"),
        cosine=mean("cosine"),
        num_images=sum(cell.num_images for cell in cells.values()),
        dense_acc1=mean("dense_acc1"),
        hit_against=difference(pairs, HIT) if fair else None,
        cosine_against=difference(pairs, COSINE) if fair else None,
        curve_gain=None if None in gains else sum(gains) / len(gains),
    )


def best_rival(lines: list[Line], name: str = "acc1") -> Line | None:
    """The method of others with the highest mean accuracy (or cosine) at the same cost; None without any."""
    fair = [line for line in lines if not (line.method.startswith(OURS) or line.misses or line.is_oracle) and line.mean]
    return max(fair, key=lambda line: getattr(line.mean, name), default=None)


def best_of_ours(lines: list[Line]) -> Line | None:
    """The most accurate of our own rows at the same cost, trained ones included; None without any."""
    fair = [line for line in lines if line.method.startswith(OURS) and not line.misses and line.mean]
    return max(fair, key=lambda line: line.mean.acc1, default=None)


def between(results: Results, macs: float, method: str, other: str, name: str = HIT) -> Difference:
    """`method` minus `other` at a budget, mean over the data sets; both must be there on all of them."""
    return difference([(panel.rows[method, macs], panel.rows[other, macs]) for panel in results.panels], name)


def strongest_rivals(results: Results) -> set[str]:
    """The best of others at every budget, by accuracy and by cosine."""
    best = (best_rival(lines_of(results, macs), name) for macs in results.budgets for name in ("acc1", "cosine"))
    return {line.method for line in best if line is not None}


def shown_methods(results: Results) -> set[str]:
    """What a figure shows in colour: all of ours, the oracles, and of each family of rivals the most accurate one."""
    best: dict[str, tuple[float, str]] = {}
    shown = {method for method in results.methods if method.startswith(OURS) or is_oracle(method)}
    for method in results.methods:
        family = family_of(method)
        rows = [line for macs in results.budgets for line in lines_of(results, macs) if line.method == method]
        gains = [cell.acc1 - cell.dense_acc1 for line in rows for cell in line.cells.values()]
        if family is not None and gains:
            best[family] = max(best.get(family, (-2.0, "")), (sum(gains) / len(gains), method))
    return shown | {method for _, method in best.values()}


def verdict(against: Difference) -> str:
    """What our method does to the other: the difference is that of the other to ours."""
    return {BETTER: "loses to", WORSE: "beats"}.get(against.verdict, "ties with")


def headlines(results: Results) -> list[str]:
    """Ours against the strongest rival at each budget, in accuracy and in cosine."""
    over = (
        f"mean of {len(results.panels)} data sets" if len(results.panels) > 1 else title_of(results.panels[0].dataset)
    )
    sentences = []
    for macs in results.budgets:
        lines = lines_of(results, macs)
        for name, against_name, scale, unit, digits in (
            ("acc1", "hit_against", -100, " points of top-1", 1),
            ("cosine", "cosine_against", -1, " of cosine", 4),
        ):
            best = best_rival(lines, name)
            against = best and getattr(best.mean, against_name)
            if not against:
                continue
            low, high = sorted((scale * against.low, scale * against.high))
            sentences.append(
                f"At {100 * macs:.0f} % of the MACs `{OURS}` {verdict(against)} the best rival, `{best.method}`: "
                f"{scale * against.mean + 0.0:+.{digits}f}{unit} [{low:+.{digits}f}, {high:+.{digits}f}] ({over})."
            )
        best, ours = best_rival(lines), best_of_ours(lines)
        if best is not None and ours is not None and ours.method != OURS:
            gain = between(results, macs, ours.method, best.method)
            word = {BETTER: "beats", WORSE: "loses to"}.get(gain.verdict, "ties with")
            low, mean, high = (100 * value + 0.0 for value in (gain.low, gain.mean, gain.high))
            sentences.append(
                f"At {100 * macs:.0f} % `{ours.method}` {word} it: {mean:+.1f} points of top-1 "
                f"[{low:+.1f}, {high:+.1f}]; {ours.text}."
            )
    return sentences
