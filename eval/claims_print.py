"""Rows of claims.json as print: the README's table, the page with reasons and commands, the text of a terminal."""

from collections.abc import Sequence

from eval.claims_rules import NOT_TESTABLE, VERDICTS
from eval.tables import as_text

UNITS = {
    "points ahead": ("{:+.1f}", " points"),
    "points lost": ("{:.1f}", " points lost"),
    "x time": ("{:.2f}", "x"),
    "x faster": ("{:.2f}", "x"),
    "cosine ahead": ("{:+.3f}", " cosine"),
    "of the headroom": ("{:.2f}", " of the headroom"),
    "of the match beyond chance": ("{:.2f}", " of the match beyond chance"),
    "GMAC": ("{:.1f}", " GMAC"),
}
"""Unit -> how a number of it is printed, and what follows it."""
NONE = "–"


def number(value: float, unit: str) -> str:
    """A number without its unit."""
    return UNITS[unit][0].format(value).replace("-", "−")


def reported_text(row: dict) -> str:
    """The paper's number with its unit; a dash for none."""
    return NONE if row["reported"] is None else number(row["reported"], row["unit"]) + UNITS[row["unit"]][1]


def ours_text(row: dict) -> str:
    """Our number with its unit, and the interval; a dash for none."""
    if row["ours"] is None:
        return NONE
    value = number(row["ours"], row["unit"]) + UNITS[row["unit"]][1]
    if row["interval"] is None:
        return value
    low, high = (number(end, row["unit"]) for end in row["interval"])
    return f"{value} [{low}, {high}]"


def counts_text(rows: Sequence[dict]) -> str:
    """How many claims have which verdict."""
    return ", ".join(f"{sum(row['verdict'] == verdict for row in rows)} {verdict}" for verdict in VERDICTS)


def by_paper(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Rows of each paper, in their order."""
    return {
        paper: [row for row in rows if row["paper"] == paper] for paper in dict.fromkeys(row["paper"] for row in rows)
    }


def compact(rows: Sequence[dict]) -> str:
    """The README's part: the table of what is measured, and how many claims are not."""
    measured = [row for row in rows if row["ours"] is not None]
    absent = {paper: len(own) for paper, own in by_paper([row for row in rows if row["ours"] is None]).items()}
    said = ", ".join(f"{count} of {paper}" for paper, count in absent.items())
    return table(measured) + (f"\n\nNot testable because not measured yet: {said}." if absent else "")


def table(rows: Sequence[dict]) -> str:
    """A Markdown table without reasons and commands."""
    lines = ["| claim | reported | ours [interval] | verdict |", "|---|---|---|---|"]
    for paper, own in by_paper(rows).items():
        lines.append(f"| **{paper}** | | | |")
        for row in own:
            verdict = row["verdict"] if row["verdict"] == NOT_TESTABLE else f"**{row['verdict']}**"
            lines.append(f"| {row['claim']} | {reported_text(row)} | {ours_text(row)} | {verdict} |")
    return "\n".join(lines)


def markdown_page(rows: Sequence[dict], said: str) -> str:
    """claims.md: the whole table, every claim with its source, rule and reason, and the commands."""
    commands = list(dict.fromkeys(row["command"] for row in rows))
    parts = [f"`{said}`", table(rows), f"{counts_text(rows)}. Reported: the papers' own numbers. {RULES}"]
    for paper, own in by_paper(rows).items():
        lines = [f"* **{row['claim']}**: {_reasons(row, 1 + commands.index(row['command']))}" for row in own]
        parts.append("\n".join([f"## {paper}", "", *lines]))
    numbered = [f"{number}. `{one}`" for number, one in enumerate(commands, 1)]
    return "\n\n".join([*parts, "\n".join(["## Commands", "", *numbered])]) + "\n"


RULES = (
    "A verdict is computed from the files by the claim's rule, never typed in; `not testable` where nothing is "
    "measured or the interval cannot tell."
)


def _reasons(row: dict, number: int) -> str:
    if row["ours"] is None:
        return f"{row['verdict']}, not measured (command {number}). Reported: {row['where']}. Rule: {row['rule']}."
    spread = "" if row["interval_of"] is None else f" Interval: {row['interval_of']}."
    why = row["why"][0].upper() + row["why"][1:]
    return f"{row['verdict']}. Reported: {row['where']}. {why} (command {number}).{spread} Rule: {row['rule']}."


def text_table(rows: Sequence[dict]) -> str:
    """The whole table for a terminal, with what to run for what is not measured."""
    parts = []
    for paper, own in by_paper(rows).items():
        lines = [[row["claim"], reported_text(row), ours_text(row), row["verdict"]] for row in own]
        parts.append(f"{paper}\n{as_text(['claim', 'reported', 'ours [interval]', 'verdict'], lines)}")
    missing = dict.fromkeys(row["command"] for row in rows if row["ours"] is None)
    asked = ["\n".join(["not measured yet:", *(f"  {one}" for one in missing)])] if missing else []
    return "\n\n".join([*parts, *asked, counts_text(rows)])
