"""The report as Markdown, for those who read it beside the code."""

from collections.abc import Sequence

from eval.report_cells import REPORTED_HEAD, REPORTED_TEXT, TABLE_TEXT
from eval.report_data import SEVEN, Results
from eval.report_figures import figures_of
from eval.report_lines import headlines
from eval.report_page import KEPT_TEXT, TITLE
from eval.report_reported import our_lines, reported_lines
from eval.report_retrieval import RETRIEVAL_TEXT, retrieval_head, retrieval_lines, title_of_panel
from eval.report_summary import CARDS_NOTE, absences_of, method_of, sets_of
from eval.report_tables import markdown_of
from eval.tables import as_markdown


def markdown_page(all_results: Sequence[Results], prefixes: Sequence[str]) -> str:
    """All image towers one after the other. Args: prefixes, of their figures' file names."""
    parts = [f"# {TITLE}", "The same as a page with figures to point at: `report.html`; every number: `report.csv`."]
    for results, prefix in zip(all_results, prefixes, strict=True):
        parts += _part(results, prefix)
    return "\n\n".join(parts) + "\n"


def _part(results: Results, prefix: str) -> list[str]:
    sets = [[one["title"], one["state"], one["accuracy"] or "–", one["text"]] for one in sets_of(results)]
    parts = [f"## {results.model}", _list(headlines(results)), CARDS_NOTE]
    parts += ["### Data sets", as_markdown(["data set", "state", "unpruned top-1 %", "images"], sets)]
    for figure in figures_of(results):
        parts += [f"### {figure.title}", figure.text, f"![{figure.title}]({prefix}{figure.name}.png)"]
    parts += ["### All numbers", TABLE_TEXT]
    for macs in results.budgets:
        parts += [f"**{100 * macs:g} % of the MACs**", markdown_of(results, macs)]
    for panel in results.retrieval:
        parts += [f"### Retrieval: {title_of_panel(panel)}", RETRIEVAL_TEXT]
        for macs in panel.budgets:
            table = as_markdown(retrieval_head(panel), retrieval_lines(panel, macs))
            parts += [f"**{100 * macs:g} % of the MACs**", table]
    absences = absences_of(results)
    parts += ["Rows that are not there:\n\n" + _list(absences)] if absences else []
    if results.pictures.get("sheets"):
        parts += ["### What is kept", KEPT_TEXT, f"![kept patches]({prefix}kept.png)"]
    return [
        *parts,
        "### Beside the papers",
        REPORTED_TEXT,
        _reported(results),
        "### How it was measured",
        _list(method_of(results)),
    ]


def _reported(results: Results) -> str:
    head = ["method", "source", *REPORTED_HEAD]
    rows = []
    for one in [*our_lines(results), *reported_lines()]:
        cells = [f"{one.name} ({'reported' if one.is_reported else 'measured here'})", one.source, one.cost]
        cells += [f"{one.values[name]:.1f}" if name in one.values else "–" for name in SEVEN]
        rows.append(
            [*cells, "–" if one.mean is None else f"{one.mean:.1f}", "" if one.lost is None else f"{-one.lost:+.1f}"]
        )
    return as_markdown(head, rows)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)
