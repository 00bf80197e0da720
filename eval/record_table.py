"""What a command leaves beside its records: a table for a terminal, the same as CSV, and the flags it ran with."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from eval.measuring import MeasureConfig, Unreached
from eval.records import Record
from eval.tables import as_csv, as_text
from patchrank.atomic import write_json, write_text

NOTE = "MACs: image tower, share of the dense one whose last block computes the class row only; 1 MAC = 2 FLOP."


def print_records(records: Sequence[Record], unreached: Sequence[Unreached] = ()) -> None:
    """Print one line per record; metrics in percent, `cosine` as it is."""
    print(as_text(["data", "method", "MACs %", *_columns(records)], [_cells(record, records) for record in records]))
    first = records[0]
    print(f"{first.task}, {first.protocol}: {first.num_images} images of {first.split} ({first.split_source}). {NOTE}")
    for one in unreached:
        print(f"no row for {one.method} at {100 * one.macs:.3g} %: {one.reason}")


def write_table(name: str, config: MeasureConfig, records: Sequence[Record]) -> None:
    """Write <out>/<name>.csv, fractions, and <out>/settings/<name>.json, every flag as it was.

    The settings lie in a folder of their own, for CLIP_benchmark's `build` takes every JSON beside the records.
    """
    said = ("dataset", "split", "protocol", "method", "macs", "keep", "macs_share", "image_macs", "num_images")
    rows = [{name: getattr(record, name) for name in said} | record.metrics for record in records]
    write_text(config.out / f"{name}.csv", as_csv(rows))
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    write_json(config.out / "settings" / f"{name}.json", flags)


def _columns(records: Sequence[Record]) -> list[str]:
    """Every metric that some record has, the main one of the first record in front."""
    names = dict.fromkeys([records[0].main_metric, *(name for record in records for name in record.metrics)])
    return [name if name == "cosine" else f"{name} %" for name in names]


def _cells(record: Record, records: Sequence[Record]) -> list[str]:
    cells = [f"{record.dataset} {record.split}", record.method, f"{100 * record.macs_share:.1f}"]
    for column in _columns(records):
        value = record.metrics.get(column.removesuffix(" %"))
        cells.append("-" if value is None else f"{value:.4f}" if column == "cosine" else f"{100 * value:.1f}")
    return cells
