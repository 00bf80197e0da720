"""`python -m eval curve`: what the place of the cuts, their number and the budget do to the feature, untrained.

Three families, every member brought to every budget, patches selected and folded as `patchrank.apply` does: one cut
before each block; equal ratios inside 1, 2, .. blocks spread over the preset's; equal ratios inside all blocks from
each first one on. In MACs and, with --time-batches, in milliseconds, all towers and the unpruned one in turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from eval.curve_picture import draw
from eval.journal import Journal
from eval.tables import as_csv, as_text
from eval.trained import Measured, check_measured, measure, plan_of, time_all
from eval.trained_methods import TRAINING_FREE, Entry
from eval.trained_rows import make_rows
from patchrank.atomic import write_bytes, write_json, write_text
from patchrank.errors import UserError
from patchrank.macs import dense_macs, pruned_macs
from patchrank.presets import Cost, schedule
from patchrank.provenance import command, machine, versions
from patchrank.pruned import PrunedTower
from patchrank.salient import salient_cost
from patchrank.search.plan import threads
from patchrank.search.store import check_request
from patchrank.spec import RESTS, PruneSpec
from patchrank.tower import TowerConfig, VisionTower
from predictors.schedule import selection
from predictors.schedule_search import equal_ratios, to_budget


@dataclass(frozen=True, kw_only=True)
class CurveConfig(Measured):
    """Cosine and milliseconds against the place of the cuts, their number and the budget; nothing is trained."""

    limit: int | None = 500
    """Images, spread over the classes; smaller limits are nested in larger ones. None: all."""
    macs: tuple[float, ...] = (0.85, 0.70, 0.56, 0.45)
    """Budgets: shares of the dense image tower's MACs, its last block computing the class row only."""
    rest: str = "fold"
    """What becomes of the patches that are not kept: "fold" or "drop"."""
    out: Path = Path("out/curve")
    """Folder of the journal, curve.json, curve.csv and curve.png."""


FAMILIES = {"one cut": "block of the one cut", "number": "number of cuts", "first": "block of the first cut"}
"""Name -> what its x says."""
UNPRUNED = "unpruned"
_COLUMNS = ("curve", "x", "budget", "rest", "image_macs", "feature_cosine", "top1_agreement", "acc1", "ms_batch16")
_COLUMNS += ("dense_ms_batch16", "num_images")


def main(config: CurveConfig) -> None:
    """Measure what is missing in `--out`, then write rows and picture."""
    if config.rest not in RESTS:
        raise UserError(f"--rest {config.rest}: unknown; choose one of {', '.join(RESTS)}")
    plan_config = check_measured(config)
    with threads(config.threads):
        plan, request = plan_of(plan_config, config.batch_size)
        request |= {"rest": config.rest}
        check_request(config.out, request)
        write_json(config.out / "search.json", request)
        tower, journal = plan.clip.tower, Journal(config.out / "curve.jsonl", ("batch", "method", "macs"))
        places, entries = make_entries(tower, config.macs, config.rest)
        measure(config, plan, entries, journal)
        dense = _unpruned(tower)
        ms = time_all(config, plan, [*entries, dense]) if config.time_batches else {}
    dense_ms = ms.get(dense.timed_as)
    rows = [places[row["method"]] | {"dense_ms_batch16": dense_ms} | row for row in make_rows(journal, entries, ms)]
    origin = {"command": command("eval"), "versions": versions(), "machine": machine()}
    sizes = {"num_images": max(row["num_images"] for row in rows), "dense_image_macs": dense_macs(tower.config)}
    settings = request | {"model": Path(config.model).name, "limit": config.limit}
    write_json(config.out / "curve.json", origin | {"settings": settings} | sizes | {"rows": rows})
    write_text(config.out / "curve.csv", as_csv([{name: row[name] for name in _COLUMNS} for row in rows]))
    write_bytes(config.out / "curve.png", draw(rows, FAMILIES))
    print(as_text(["curve", "", "MACs %", "cosine", "ms"], [_cells(row) for row in rows]))
    print(f"curve.json, curve.csv and curve.png in {config.out}")


def families(config: TowerConfig, manner: PruneSpec) -> dict[str, dict[int, PruneSpec]]:
    """Family -> x -> cuts of some ratio, to be brought to a budget."""
    preset = schedule(config.num_layers)
    return {
        "one cut": {layer: replace(manner, cuts=((layer, 0.9),), where="before") for layer in range(config.num_layers)},
        "number": {num: equal_ratios(manner, spread(preset, num)) for num in range(1, len(preset) + 1)},
        "first": {first: equal_ratios(manner, range(first, preset[-1] + 1)) for first in range(preset[-1] + 1)},
    }


def spread(layers: Sequence[int], num: int) -> list[int]:
    """`num` of some blocks, from the first on, as evenly apart as can be; the last one too from two on."""
    return [layers[round(place * (len(layers) - 1) / max(1, num - 1))] for place in range(num)]


def make_entries(tower: VisionTower, budgets: Sequence[float], rest: str) -> tuple[dict[str, dict], list[Entry]]:
    """Method -> its family and x; and one entry for every method and budget that it can reach."""
    manner, scorer = selection(tower.config, rest)
    cost: Cost = salient_cost(pruned_macs, manner.select == "cover")
    places, entries = {}, []
    for (family, members), macs in product(families(tower.config, manner).items(), budgets):
        for x, spec in to_budget(members, macs, tower.config, cost).items():
            name = f"{FAMILIES[family]}: {x}"
            places[name] = {"curve": family, "x": x}
            entry = Entry(
                method=name,
                family="ours",
                mode=TRAINING_FREE,
                budget=macs,
                image_macs=cost(tower.config, spec),
                run=PrunedTower(tower, spec, scorer).eval(),
                spec=spec,
            )
            entries.append(entry)
    if not entries:
        raise UserError(f"--macs {' '.join(map(str, budgets))}: no cuts reach any of these; choose higher values")
    return places, entries


def _unpruned(tower: VisionTower) -> Entry:
    """For its time only."""
    share = {"budget": 1.0, "image_macs": dense_macs(tower.config)}
    return Entry(method=UNPRUNED, family="ours", mode=TRAINING_FREE, run=tower, **share)


def _cells(row: dict) -> list[str]:
    ms = row["ms_batch16"]
    numbers = [f"{100 * row['budget']:g}", f"{row['feature_cosine']:.4f}", "-" if ms is None else f"{ms:.1f}"]
    return [FAMILIES[row["curve"]], str(row["x"]), *numbers]
