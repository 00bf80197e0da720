"""What `compare` leaves: compare.json, the same rows as CSV, and one Markdown table per budget."""

from dataclasses import asdict
from pathlib import Path

from eval.compare_rows import Against, CompareRow, Unreached, best_rival
from eval.rivals import OURS
from eval.tables import as_csv, as_markdown, as_text, flat
from patchrank.atomic import write_json, write_text

NOTE = (
    "MACs: image tower, share of the dense one whose last block computes the class row only, as every row's does; "
    "! misses the budget by more than 1 %, so the comparison is not equal. cosine: to the unpruned feature. "
    "agreement: same top-1 answer as the unpruned tower. In brackets the 95 % paired bootstrap interval of the "
    "difference to ours on the same images; + is better than ours. Nothing is trained."
)
_HEAD = ["method", "MACs %", "cosine", "[to ours]", "agreement %", "[to ours]", "top-1 %", "[to ours]"]


def write_report(folder: Path, origin: dict, rows: list[CompareRow], unreached: list[Unreached]) -> None:
    """Write all three files. Args: origin: command, versions and other fields of the JSON."""
    missing = [asdict(one) for one in unreached]
    write_json(folder / "compare.json", origin | {"rows": [asdict(row) for row in rows], "unreached": missing})
    write_text(folder / "compare.csv", as_csv([flat(row) for row in rows]))
    parts = [f"**{_title(part)}**\n\n{as_markdown(_HEAD, list(map(_cells, part)))}" for part in by_budget(rows)]
    lines = "\n".join(f"* {line}" for line in [*headlines(rows), *map(_absence, unreached)])
    write_text(folder / "compare.md", "\n\n".join([f"`{origin['command']}`", *parts, NOTE, lines]) + "\n")


def text_table(rows: list[CompareRow], unreached: list[Unreached]) -> str:
    """The same for a terminal."""
    parts = [f"{_title(part)}\n{as_text(_HEAD, list(map(_cells, part)))}" for part in by_budget(rows)]
    return "\n\n".join([*parts, NOTE, "\n".join([*headlines(rows), *map(_absence, unreached)])])


def by_budget(rows: list[CompareRow]) -> list[list[CompareRow]]:
    """Rows of each budget, in their order."""
    return [[row for row in rows if row.macs == macs] for macs in dict.fromkeys(row.macs for row in rows)]


def headlines(rows: list[CompareRow]) -> list[str]:
    """Ours against the best rival at each budget, one sentence each."""
    lines = []
    for part in by_budget(rows):
        ours, best = part[0], best_rival(part)
        if best is None:
            continue
        gain = best.cosine_against
        low, high = -gain.interval[1], -gain.interval[0]
        verdict = "beats" if low > 0 else "loses to" if high < 0 else "is level with"
        lines.append(
            f"at {100 * ours.macs:g} % of the MACs {OURS} {verdict} the best rival, {best.rival}: "
            f"cosine {-gain.mean:+.4f} [{low:+.4f}, {high:+.4f}]"
        )
    return lines


def _title(rows: list[CompareRow]) -> str:
    first = rows[0]
    dense = "" if first.dense_acc1 is None else f", unpruned top-1 {100 * first.dense_acc1:.1f} %"
    return f"{100 * first.macs:g} % of the MACs, {first.num_images} images{dense}"


def _absence(one: Unreached) -> str:
    return f"no row for {one.rival} at {100 * one.macs:g} %: {one.reason}"


def _cells(row: CompareRow) -> list[str]:
    return [
        row.rival,
        f"{100 * row.macs_share:.1f}{'!' * row.misses_budget}",
        f"{row.cosine:.4f}",
        _interval(row.cosine_against, 1, 4),
        _percent(row.agreement),
        _interval(row.agreement_against, 100, 1),
        _percent(row.acc1),
        _interval(row.acc1_against, 100, 1),
    ]


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def _interval(against: Against | None, scale: int, digits: int) -> str:
    if against is None:
        return "-"
    low, high = (scale * value for value in against.interval)
    return f"[{low:+.{digits}f}, {high:+.{digits}f}]"
