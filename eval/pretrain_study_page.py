"""The study as a page of Markdown: what every recipe reaches, and by how much it differs from plain CLIP."""

import math
import statistics

from eval.pretrain_study_report import main_metrics
from eval.tables import as_markdown

_TIERS = {1: "Tier 1", 2: "Tier 2 (short runs, indicative)", 3: "Tier 3 (ablations of the maskers, indicative)"}


def as_page(rows: list[dict], against: dict[str, list[dict]], setup: dict) -> str:
    """Tables by tier from `study_rows` and `verdicts` ("against_<base>" -> verdicts), with a legend."""
    parts = [
        "# Pretraining recipes at one budget",
        f"{setup['num_finished']} of {setup['num_runs']} runs are finished. Data: {setup['data']}, batches of "
        f"{setup['batch_size']}; test pictures, all patches seen. Values in percent: accuracy (and its mean over "
        "classes where these are not equally large), or recall at 5 from text to picture; behind each, points "
        "ahead of plain CLIP of the same tier with their 95 % interval (over test pictures, or over seeds where these "
        "scatter more; one seed says nothing of other seeds), bold where it leaves 0 out. "
        "PMAC: 10^15 multiply-accumulates of the whole run.",
    ]
    for tier in sorted({row["tier"] for row in rows}):
        own = [row for row in rows if row["tier"] == tier]
        parts += [f"## {_TIERS[tier]}", _table(own, against["against_clip"])]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[dict], found: list[dict]) -> str:
    metrics = main_metrics(rows)
    known = {(one["tier"], one["recipe"], one["metric"]): one for one in found}
    lines = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == recipe]
        minutes, petamacs = (statistics.fmean(row[name] for row in own) for name in ("seconds", "macs"))
        steps = str(round(statistics.fmean(row["steps"] for row in own)))
        cells = [_cell(own, metric, known.get((own[0]["tier"], recipe, metric))) for metric in metrics]
        lines.append([recipe, str(len(own)), steps, f"{minutes / 60:.0f}", f"{petamacs / 1e15:.3f}", *cells])
    return as_markdown(["recipe", "seeds", "steps", "processor minutes", "PMAC", *metrics], lines)


def _cell(rows: list[dict], metric: str, verdict: dict | None) -> str:
    value = f"{100 * statistics.fmean(row['metrics'].get(metric, math.nan) for row in rows):.1f}"
    if verdict is None:
        return value
    low, high = (100 * end for end in verdict["interval"])
    difference = f"{100 * verdict['difference']:+.1f}"
    shown = f"**{difference}**" if low > 0 or high < 0 else difference
    return f"{value} ({shown} [{low:.1f}, {high:.1f}])"
