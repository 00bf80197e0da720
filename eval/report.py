"""`python -m eval report` (and `python -m eval.report`): Markdown, CSV, one HTML page and pictures from JSON alone."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.report_data import Results, read_results
from eval.report_figures import figures_of
from eval.report_lines import headlines, shown_methods, strongest_rivals
from eval.report_markdown import markdown_page
from eval.report_page import html_of
from eval.report_plots import all_looks, as_png
from eval.report_retrieval import retrieval_csv
from eval.report_sheet import kept_png
from eval.report_tables import csv_of
from eval.tables import as_csv
from patchrank import cli
from patchrank.atomic import write_bytes, write_text
from patchrank.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Pages from what a suite has measured: Markdown, CSV, one self-contained HTML page, PNG; runs no model."""

    results: Path = Path("out/suite")
    """Folder of the records, as python -m eval suite leaves it; unfinished ones do."""
    model: str | None = None
    """Only this model (its name, or the beginning of its weights' hash), where the folder holds several."""
    photos: bool = True
    """Show the images themselves under the kept patches; --no-photos for data that must not be passed on."""
    out: Path = Path("out/report")
    """Folder of report.html, report.md, report.csv and the figures."""


def main(config: ReportConfig) -> None:
    """Read, write, and say the headlines."""
    chosen = choose(read_results(config.results), config.model)
    for number, results in enumerate(chosen):
        write_figures(config.out, results, prefix_of(number), config.photos)
    write_text(config.out / "report.csv", join_csv([csv_of(one) for one in chosen]))
    if any(one.retrieval for one in chosen):
        write_text(config.out / "retrieval.csv", retrieval_csv(chosen))
    write_text(config.out / "report.md", markdown_page(chosen, [prefix_of(number) for number in range(len(chosen))]))
    write_text(config.out / "report.html", html_of(chosen, config.photos))
    for results in chosen:
        print("\n".join([f"{results.model}:", *(f"  {line}" for line in headlines(results))]))
    print(f"report.html, report.md, report.csv and PNG figures in {config.out}")


def choose(results: list[Results], model: str | None) -> list[Results]:
    """All, or those of one model. Raises: UserError for a model that is not there."""
    if model is None:
        return results
    found = [one for one in results if one.model == model or one.weights_hash.startswith(model)]
    if not found:
        known = ", ".join(f"{one.model} ({one.weights_hash[:8]})" for one in results)
        raise UserError(f"--model {model}: not among the results; there are {known}")
    return found


def prefix_of(number: int) -> str:
    """Part of the figures' names that tells models apart; empty for the first."""
    return "" if number == 0 else f"model{number + 1}_"


def write_figures(folder: Path, results: Results, prefix: str, photos: bool) -> None:
    """One PNG per figure, all its panels on one sheet, and one of kept patches."""
    looks = all_looks(results.methods, strongest_rivals(results), shown_methods(results))
    for figure in figures_of(results):
        sheet = as_png(figure.draw, figure.panels, looks, f"{figure.title}: {results.model}")
        write_bytes(folder / f"{prefix}{figure.name}.png", sheet)
    kept = kept_png(results.pictures, photos)
    if kept is not None:
        write_bytes(folder / f"{prefix}kept.png", kept)


def join_csv(parts: Sequence[str]) -> str:
    """CSV texts of several models under one head."""
    return as_csv([row for part in parts for row in csv.DictReader(io.StringIO(part))])


if __name__ == "__main__":
    cli.run(main, ReportConfig, prog="python -m eval.report")
