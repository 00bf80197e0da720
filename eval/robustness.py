"""`python -m eval robustness`: zero-shot accuracy on shifted versions of a data set, and what is lost to the shift.

The records are those of `zero-shot`, one for each variant; the table adds means, always recomputed from them.
"""

from dataclasses import dataclass
from pathlib import Path

from eval import zero_shot
from eval.measuring import Bench, MeasureConfig, open_bench
from eval.record_table import print_records, write_table
from eval.records import Record
from eval.tables import as_text
from eval.zero_shot import ZeroShotConfig
from patchrank.errors import UserError

IMAGENET = ("imagenet", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-o", "imagenet-sketch")
"""The column order of the papers' tables."""


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig(MeasureConfig):
    """Zero-shot accuracy on ImageNet's variants, or on corrupted digits, one JSON each."""

    data: tuple[str, ...] = ("digits", "digits-noise", "digits-blur", "digits-contrast")
    """The data set itself, then its variants; "imagenet" alone stands for it and V2, A, R, O, Sketch."""
    split: str = "test"
    """Split to judge on."""
    protocol: str = "coop"
    """coop, openai or vtab, as in zero-shot."""
    out: Path = Path("out/robustness")
    """Folder of the records."""


def main(config: RobustnessConfig) -> None:
    """Measure what `--out` lacks, then print the variants and their means."""
    with open_bench(config) as bench:
        records = measure(config, bench)
    write_table("robustness", config, records)
    print_records(records, bench.unreached)
    print(means_table(records))
    print(f"{len(records)} records in {config.out}")


def measure(config: RobustnessConfig, bench: Bench) -> list[Record]:
    """Records of all methods on all variants, in the order of --data; a variant that is absent stops the run.

    Raises: UserError as `zero_shot.measure`.
    """
    if not config.data:
        raise UserError("--data: names no data set; write imagenet for all of its variants")
    names = IMAGENET if config.data == ("imagenet",) else config.data
    shared = {name: value for name, value in vars(config).items() if name != "data"}
    return [record for name in names for record in zero_shot.measure(ZeroShotConfig(data=name, **shared), bench, name)]


@dataclass(frozen=True, kw_only=True)
class Means:
    """One method at one budget over the variants; fractions."""

    itself: float
    """Main metric on the first data set."""
    shifted: float
    """Mean over the others ("OOD avg" of the papers, without the first)."""
    all: float
    """Mean over all of them."""


def means(records: list[Record]) -> dict[tuple[str, float], Means]:
    """(method, budget) -> means; the first data set of the records is the one that was shifted."""
    rows: dict[tuple[str, float], dict[str, float]] = {}
    for record in records:
        rows.setdefault((record.method, record.macs), {})[record.dataset] = record.main
    found = {}
    for key, row in rows.items():
        first, *others = row.values()
        everything = sum(row.values()) / len(row)
        shifted = sum(others) / len(others) if others else first
        found[key] = Means(itself=first, shifted=shifted, all=everything)
    return found


def means_table(records: list[Record]) -> str:
    """The means for a terminal, in percent."""
    lines = [
        [method, f"{100 * macs:.3g}", *(f"{100 * value:.1f}" for value in (row.itself, row.shifted, row.all))]
        for (method, macs), row in means(records).items()
    ]
    head = ["method", "budget %", records[0].dataset, "mean of the variants", "mean of all"]
    return f"{records[0].main_metric}, %\n{as_text(head, lines)}"
