"""Rows as CSV, Markdown and text: pure functions from dataclasses and cells to strings."""

import csv
import io
from dataclasses import asdict


def flat(row: object) -> dict:
    """A dataclass without nesting: {"a": {"0.8": x}} becomes `a 0.8`, a pair becomes `low` and `high`."""
    cells = {}
    for name, value in asdict(row).items():
        cells |= _flat(name, value)
    return cells


def _flat(name: str, value: object) -> dict:
    if isinstance(value, dict):
        parts = [_flat(f"{name} {key}", part) for key, part in value.items()]
        return {key: cell for part in parts for key, cell in part.items()}
    if isinstance(value, tuple):
        return {f"{name} low": value[0], f"{name} high": value[1]}
    return {} if value is None else {name: value}


def as_csv(rows: list[dict]) -> str:
    """CSV with the union of all columns; what a row lacks stays empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def as_text(head: list[str], lines: list[list[str]]) -> str:
    """The same for a terminal, in columns of equal width."""
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    first, *others = widths
    return "\n".join(
        "  ".join([f"{line[0]:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(line[1:], others))])
        for line in [head, *lines]
    )
