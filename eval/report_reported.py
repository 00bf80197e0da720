"""Numbers of papers beside ours: what each lost against its own unpruned model, on the data sets that both have.

The papers' models, checkpoints and prompts are others than ours; only losses against the own dense row are side by
side. Averages are recomputed from the printed cells.
"""

from dataclasses import dataclass

from eval.report_data import SEVEN, Results
from eval.reported_checks import findings, recomputed_mean
from eval.reported_tables import Row, Table, load_table
from eval.rivals import OURS

Place = tuple[str, str]
"""(table, row)."""
_DENSE: Place = ("patch_ranking_5", "dense")
_TUNED: Place = ("patch_ranking_5", "text and visual prompts, dense")
_COOP: Place = ("crossget_coop", "CoOp dense")


@dataclass(frozen=True, kw_only=True)
class ReportedLine:
    """One row; top-1 in percent."""

    name: str
    source: str
    is_reported: bool
    cost: str
    """As the source says it, or MACs of the image tower for ours."""
    values: dict[str, float]
    mean: float | None
    """Recomputed over the seven; None where some are absent."""
    lost: float | None
    """Points against the own dense row, mean over the data sets that the row has; None for the dense row itself."""
    is_dense: bool = False


def reported_lines() -> list[ReportedLine]:
    """Published rows on the seven data sets, each group behind its unpruned model."""
    rows = [(_DENSE, None), *((("patch_ranking_4", row.name), _DENSE) for row in load_table("patch_ranking_4").rows)]
    lines = [_reported(*_at(place), base) for place, base in rows]
    lines += [_reported(*_at(_TUNED), None)]
    lines += [_reported(*_at(("patch_ranking_5", "text and visual prompts, pruned")), _TUNED)]
    table = load_table("crossget_coop")
    return lines + [_reported(table, row, None if row.name == _COOP[1] else _COOP) for row in table.rows]


def _at(place: Place) -> tuple[Table, Row]:
    table = load_table(place[0])
    return table, table.row(place[1])


def _reported(table: Table, row: Row, base: Place | None) -> ReportedLine:
    values = {name: row.values[name] for name in SEVEN if name in row.values}
    lost = None
    if base is not None:
        dense = _at(base)[1].values
        lost = sum(dense[name] - values[name] for name in values) / len(values)
    cost = f'{row.values["GFLOPs"]:g} "GFLOPs"' if "GFLOPs" in row.values else ""
    if "GFLOPs share" in row.values:
        cost = f"{100 * row.values['GFLOPs share']:.0f} % of GFLOPs"
    return ReportedLine(
        name=row.name,
        source=table.source,
        is_reported=True,
        cost=cost,
        values=values,
        mean=recomputed_mean(row, SEVEN) if len(values) == len(SEVEN) else None,
        lost=lost,
        is_dense=base is None,
    )


def our_lines(results: Results) -> list[ReportedLine]:
    """Our unpruned tower and our method at every budget, on those of the seven that were measured."""
    panels = [panel for panel in results.panels if panel.dataset in SEVEN]
    if not panels:
        return []
    dense = {panel.dataset: 100 * panel.dense.record.metrics["acc1"] for panel in panels}
    source = f"{results.model}, {', '.join(dict.fromkeys(panel.protocol for panel in panels))}"
    lines = [_ours("unpruned", source, "100 % of MACs", dense, None)]
    for macs in results.budgets:
        values = {p.dataset: 100 * p.rows[OURS, macs].record.metrics["acc1"] for p in panels if (OURS, macs) in p.rows}
        if len(values) == len(panels):
            lost = sum(dense[name] - values[name] for name in values) / len(values)
            lines.append(_ours(OURS, source, f"{100 * macs:g} % of MACs", values, lost))
    return lines


def _ours(name: str, source: str, cost: str, values: dict[str, float], lost: float | None) -> ReportedLine:
    mean = sum(values.values()) / len(values) if len(values) == len(SEVEN) else None
    return ReportedLine(
        name=name,
        source=source,
        is_reported=False,
        cost=cost,
        values=values,
        mean=mean,
        lost=lost,
        is_dense=lost is None,
    )


def finding_texts() -> list[str]:
    """What does not add up in the printed tables."""
    return [f"{one.table.replace('_', ' ')}: {one.text}" for one in findings()]
