"""`python -m eval reported`: tables of papers as data, and what does not add up in them.

The files `eval/reported/*.json` hold printed numbers with their source; nothing here is measured by us.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from eval.tables import as_text
from patchrank.atomic import write_json
from patchrank.errors import UserError

FOLDER = Path(__file__).parent / "reported"
SEVEN = ("caltech101", "pets", "flowers102", "food101", "aircraft", "dtd", "ucf101")
"""The seven data sets, as the tables order them."""


@dataclass(frozen=True)
class Finding:
    """One thing that does not add up, or that a table does not say of itself."""

    kind: str
    table: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One printed row."""

    name: str
    values: dict[str, float]
    """Column -> number as printed; what the source leaves out is absent."""
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Table:
    """One printed table."""

    name: str
    title: str
    source: str
    model: str
    unit: str
    note: str
    means: dict[str, tuple[str, ...]]
    """Column of averages -> the columns that it averages."""
    rows: tuple[Row, ...]

    @property
    def columns(self) -> list[str]:
        """All columns, in the order of their first appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row.values))

    def row(self, name: str) -> Row:
        """The row of a name. Raises: KeyError."""
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise KeyError(f"{self.name} has no row {name!r}: {', '.join(row.name for row in self.rows)}")
        return found[0]


@cache
def load_table(name: str) -> Table:
    """One table by the name of its file. Raises: UserError for an unknown one."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        raise UserError(f"--table {name}: unknown; choose from {', '.join(table_names())}")
    values = json.loads(path.read_text(encoding="utf-8"))
    means = {one["column"]: tuple(one["of"]) for one in values.pop("means")}
    return Table(name=name, means=means, rows=tuple(Row(**row) for row in values.pop("rows")), **values)


def table_names() -> list[str]:
    """All tables, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def as_rows(table: Table) -> tuple[list[str], list[list[str]]]:
    """Head and cells for `eval.tables`."""
    cells = [
        [row.name, *(f"{row.values[column]:g}" if column in row.values else "-" for column in table.columns)]
        for row in table.rows
    ]
    return ["reported", *table.columns], cells


@dataclass(frozen=True, kw_only=True)
class ReportedConfig:
    """Tables of the papers as they print them, and what does not add up in them."""

    table: tuple[str, ...] = ()
    """Tables to print; without it only the findings."""
    out: Path = Path("out/reported")
    """Folder of findings.json."""


def main(config: ReportedConfig) -> None:
    """Print the asked-for tables and every finding; write the findings."""
    from eval.reported_checks import findings

    for name in config.table:
        table = load_table(name)
        print(f"{table.title} ({table.source}; {table.model}; {table.unit})\n{as_text(*as_rows(table))}")
        print(f"{table.note}\n" if table.note else "")
    found = findings()
    for one in found:
        print(f"{one.table}: {one.text}")
    write_json(config.out / "findings.json", [vars(one) for one in found])
    print(f"{len(table_names())} tables ({', '.join(table_names())}); findings.json in {config.out}")
