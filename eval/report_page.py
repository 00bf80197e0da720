"""One self-contained HTML page: inline SVG and CSS, nothing fetched from anywhere."""

from collections.abc import Sequence
from pathlib import Path

import jinja2

from eval.report_cells import (
    OTHERS_HEAD,
    PROTOCOL_HEAD,
    REPORTED_HEAD,
    REPORTED_TEXT,
    TABLE_TEXT,
    other_row,
    protocol_row,
    reported_row,
    table_of,
)
from eval.report_data import Results
from eval.report_figures import figures_of
from eval.report_kept import sheets_of
from eval.report_lines import shown_methods, strongest_rivals
from eval.report_plots import all_looks, as_svg, drawn, legend_svg, tidy_svg
from eval.report_reported import finding_texts, our_lines, reported_lines
from eval.report_retrieval import RETRIEVAL_TEXT, retrieval_head, retrieval_lines, title_of_panel
from eval.report_summary import CARDS_NOTE, absences_of, card_of, facts_of, method_of, sets_of, summary_of

TITLE = "Accuracy versus throughput"
PAGES = Path(__file__).parent / "pages"
KEPT_TEXT = (
    "Bright patches are still tokens of their own after the last cut; faded ones were folded into them. Best and worst "
    "by cosine to the unpruned feature, so failures are shown as readily as successes."
)
NO_PHOTOS = "The photographs belong to the data sets and are left out."


def html_of(all_results: Sequence[Results], with_photos: bool) -> str:
    """The page for one or several image towers."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    parts = [part_of(one, f"m{number}", with_photos) for number, one in enumerate(all_results)]
    css = (PAGES / "report.css").read_text()
    footer = "Made by python -m eval report from JSON files alone; every number is in report.csv beside this page."
    return environment.get_template("report.html").render(title=TITLE, css=css, parts=parts, footer=footer)


def part_of(results: Results, slug: str, with_photos: bool) -> dict:
    """Everything that the template shows of one image tower."""
    looks, figures = all_looks(results.methods, strongest_rivals(results), shown_methods(results)), figures_of(results)
    sheets = sheets_of(results.pictures, with_photos)
    lines = our_lines(results) + reported_lines()
    anchors = [("summary", "In short"), ("sets", "Data sets"), *((one.name, _short(one.title)) for one in figures)]
    anchors += [
        ("tables", "All numbers"),
        *([("retrieval", "Retrieval")] if results.retrieval else []),
        *([("kept", "What is kept")] if sheets else []),
    ]
    return {
        "slug": slug,
        "subtitle": f"{results.model}, an image tower that looks at fewer patches: {len(results.methods)} "
        f"methods at equal compute on {len(results.panels)} {'data set' if len(results.panels) == 1 else 'data sets'}.",
        "facts": facts_of(results),
        "anchors": [*anchors, ("reported", "Beside the papers"), ("method", "How it was measured")],
        "summary": summary_of(results),
        "cards": [card for macs in results.budgets if (card := card_of(results, macs))],
        "cards_note": CARDS_NOTE,
        "sets": sets_of(results),
        "figures": [
            {
                "name": one.name,
                "title": one.title,
                "text": one.text,
                "legend": [
                    (name, tidy_svg(svg, f"{slug} {one.name} {name}"))
                    for name, svg in legend_svg(drawn(looks, one.panels))
                ],
                "svgs": [as_svg(one.draw, panel, looks, f"{slug} {one.title}: {panel.title}") for panel in one.panels],
            }
            for one in figures
        ],
        "table_text": TABLE_TEXT,
        "tables": [table_of(results, macs) for macs in results.budgets],
        "retrieval_text": RETRIEVAL_TEXT,
        "retrieval": [
            {
                "title": f"{title_of_panel(panel)}: {100 * macs:g} % of the MACs",
                "head": retrieval_head(panel),
                "rows": retrieval_lines(panel, macs),
            }
            for panel in results.retrieval
            for macs in panel.budgets
        ],
        "absences": absences_of(results),
        "sheets": sheets,
        "kept_text": KEPT_TEXT if with_photos else f"{KEPT_TEXT} {NO_PHOTOS}",
        "reported_text": REPORTED_TEXT,
        "reported_head": REPORTED_HEAD,
        "reported": [reported_row(one) for one in lines],
        "findings": finding_texts(),
        "others_head": OTHERS_HEAD,
        "others": [other_row(one) for one in results.others if one.main_metric],
        "method": method_of(results),
        "protocol_head": PROTOCOL_HEAD,
        "protocols": [protocol_row(panel.dense.record) for panel in results.panels],
    }


def _short(title: str) -> str:
    return title.replace("What is lost at each budget", "Losses").replace("Accuracy against ", "Accuracy / ")
