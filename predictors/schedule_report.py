"""Rows of the schedule table, and how they are printed."""

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from patchrank.macs import dense_macs
from patchrank.pruned import PrunedTower, Scorer
from patchrank.spec import PruneSpec
from patchrank.tower import VisionTower
from predictors.schedule_costs import MacCosts, total
from predictors.schedule_search import Judge
from predictors.schedule_times import TimeCosts, milliseconds

DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One schedule; cosines to the unpruned feature, costs of the image tower alone."""

    name: str
    cuts: str
    """layer:count of each, as --cuts takes it."""
    where: str
    macs_share: float
    ms_predicted: float
    """Per image, from the table of stages."""
    ms_measured: float
    """Per image, the whole tower, all rows of this table in turns."""
    cosine_deciding: float
    cosine_held_out: float
    cosine_refitted: float | None
    """Held-out images, after the calibration of --refit; None where there was none."""


@torch.inference_mode()
def make_rows(
    tower: VisionTower,
    specs: dict[str, PruneSpec],
    scorer: Scorer,
    times: TimeCosts,
    judges: tuple[Judge, Judge],
    rounds: int,
    refitted: Mapping[str, float],
) -> list[Row]:
    """The table, the dense tower first; all towers are timed in turns.

    Args: specs by name; scorer asked at every cut; judges on the images that decide, and on others;
    refitted, cosines after a calibration by name.
    """
    tower_config, device = tower.config, tower.position.device
    specs = {DENSE: PruneSpec(cuts=())} | specs
    towers = {name: tower if name == DENSE else PrunedTower(tower, spec, scorer) for name, spec in specs.items()}
    image_BCHW = torch.randn(times.batch_size, 3, *tower_config.image_size, device=device)
    calls = {name: lambda module=module: module(image_BCHW) for name, module in towers.items()}
    measured = milliseconds(calls, rounds, device)
    rows = []
    for name, spec in specs.items():
        cosine = [1.0 if name == DENSE else judge(spec) for judge in judges]
        rows.append(
            Row(
                name=name,
                cuts=",".join(f"{layer}:{K}" for layer, K in spec.counts(tower_config.num_patches)),
                where=spec.where if spec.cuts else "",
                macs_share=total(MacCosts(tower_config, spec), tower_config, spec) / dense_macs(tower_config),
                ms_predicted=total(times, tower_config, spec) / times.batch_size,
                ms_measured=measured[name] / times.batch_size,
                cosine_deciding=cosine[0],
                cosine_held_out=cosine[1],
                cosine_refitted=refitted.get(name),
            )
        )
    return rows


def advice(rows: list[Row]) -> str:
    """One sentence: what to take, or that pruning does not pay here."""
    dense, searched = rows[0], rows[-1]
    if searched.ms_measured >= dense.ms_measured:
        return (
            f"pruning saves no time here at this batch size ({searched.ms_measured:.3g} ms an image against "
            f"{dense.ms_measured:.3g} dense): take a larger batch, a lower budget, or leave the tower dense"
        )
    faster = dense.ms_measured / searched.ms_measured
    return (
        f"{faster:.2f} times as fast as dense: {searched.cuts}, cuts {searched.where} the blocks; "
        "`spec` of schedule.json holds it for patchrank.apply(model, spec=...)"
    )


def markdown(rows: list[Row], batch_size: int) -> str:
    """The table for people; its last column stands only where schedules were calibrated."""
    columns = ["schedule", "cuts", "MACs %", "ms predicted", "ms measured", "cosine"]
    any_refitted = any(row.cosine_refitted is not None for row in rows)
    lines = [columns + ["calibrated"] * any_refitted, ["---"] * (len(columns) + any_refitted)]
    for row in rows:
        cells = [row.name, f"{row.where} {row.cuts}", f"{100 * row.macs_share:.1f}", f"{row.ms_predicted:.3g}",
                 f"{row.ms_measured:.3g}", f"{row.cosine_held_out:.4f}"]  # fmt: skip
        after = "" if row.cosine_refitted is None else f"{row.cosine_refitted:.4f}"
        lines.append(cells + [after] * any_refitted)
    note = f"ms per image at batch {batch_size}, image tower alone; cosine to the unpruned feature, held-out images"
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note])


def as_csv(rows: list[Row]) -> str:
    """The same rows for machines."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()
