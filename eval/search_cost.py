"""`python -m eval search-cost`: every search strategy and every free scorer side by side on the same images."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from eval.cost_measure import Bench, measure_seconds, measure_worth, prior_worth, timed_images
from eval.cost_report import text_table, write_report
from eval.cost_rows import dense_acc1, make_rows
from eval.journal import Journal
from eval.orders import ENTRIES, EXACT, by_image, entry_of, read_stores
from patchrank.atomic import write_json
from patchrank.errors import UserError
from patchrank.loading import load_clip
from patchrank.provenance import command, machine, versions
from patchrank.search.config import SearchConfig, SplitConfig, check
from patchrank.search.cost import strategy_cost
from patchrank.search.plan import Plan, make_plan, threads
from patchrank.search.store import RankingStore, check_request
from patchrank.search.variants import CHUNK
from patchrank.spec import RESTS


@dataclass(frozen=True, kw_only=True)
class SearchCostConfig(SplitConfig):
    """Quality, compute and seconds of all search strategies, beside scorers that cost nothing."""

    limit: int | None = 4
    """Images, spread over the classes; with --stores those of them that the stores hold. None: all."""
    layer: int | None = None
    """Blocks that run before the cut; without it a quarter of the depth."""
    rest: tuple[str, ...] = RESTS
    """What becomes of the patches that are not kept: fold, drop or both."""
    merge_norm: str = "preserve"
    """Norm of folded tokens: "preserve" or "mean"."""
    criterion: str = "preservation"
    """What the searches look at: preservation, confidence or label (an oracle). Quality is always preservation."""
    strategies: tuple[str, ...] = tuple(ENTRIES)
    """Rows to measure; greedy-1 is always there, quality is relative to it."""
    stores: tuple[Path, ...] = ()
    """Ranking stores whose orders are used instead of searching again."""
    partial: bool = False
    """Accept --stores that are not finished."""
    time: bool = True
    """Measure seconds (nothing else should run then); --no-time leaves that to a later run with the same --out."""
    time_images: int = 8
    """Images to time."""
    full_image: bool = False
    """Also time every round of exact greedy on one image, cached and not (minutes)."""
    seed: int = 0
    """Seed of strategies and scorers that draw."""
    chunk: int = CHUNK
    """Pruned variants per call."""
    out: Path = Path("out/search-cost")
    """Folder of the journals, the table and the picture."""


def main(config: SearchCostConfig) -> None:
    """Measure what is missing in `--out`, then write the report."""
    _check(config)
    with threads(config.threads):
        plans = make_plans(config)
        bench = make_bench(config, plans)
        request = resume_key(next(iter(plans.values())))
        check_request(config.out, request)
        write_json(config.out / "search.json", request)
        worths = Journal(config.out / "worths.jsonl", ("image", "rest", "ranking"))
        times = Journal(config.out / "times.jsonl", ("image", "rest", "ranking", "kind"))
        with _bar("orders", sum(map(len, bench.images.values()))) as bar:
            broken = measure_worth(bench, worths, bar.update)
        for images in bench.images.values():
            images[:] = [item for item in images if item.id not in broken]
        if not all(bench.images.values()):
            raise UserError(
                f"--data {config.data}: all {len(broken)} images are broken; raise --limit or choose other data"
            )
        prior = {rest: prior_worth(bench, worths, rest) for rest in config.rest}
        load = os.getloadavg()[0]
        if config.time:
            with _bar("seconds", len(timed_images(bench, config.time_images))) as bar:
                measure_seconds(bench, worths, times, config.time_images, config.full_image, bar.update)
        rows = [row for rest in config.rest for row in make_rows(bench, rest, worths, times, prior[rest])]
        numbers = {"num_images": max(map(len, bench.images.values())), "threads": torch.get_num_threads()}
        numbers |= {"dense_acc1": dense_acc1(bench, worths)}
        write_report(config.out, _origin(config, next(iter(plans.values())), load) | numbers | {"broken": broken}, rows)
    print(text_table(rows))
    print(f"search_cost.json, .csv, .md and .png in {config.out}")


def _check(config: SearchCostConfig) -> None:
    """Raises: UserError for values that need neither model nor data to be seen wrong."""
    for name in config.strategies:
        if name not in ENTRIES:
            raise UserError(f"--strategies {name}: unknown; choose from {', '.join(ENTRIES)}")
    if not config.rest or len(set(config.rest)) != len(config.rest) or not set(config.rest) <= set(RESTS):
        raise UserError(f"--rest {' '.join(config.rest)}: must be {RESTS[0]}, {RESTS[1]} or both")
    if config.time_images < 1:
        raise UserError(f"--time-images {config.time_images}: must be 1 or more; use --no-time for no timing")
    check(_search_config(config, config.rest[0]))


def _search_config(config: SearchCostConfig, rest: str) -> SearchConfig:
    shared = "model pretrained data data_root split limit layer merge_norm criterion seed chunk threads device out"
    entry = ENTRIES[EXACT]
    return SearchConfig(
        **{name: getattr(config, name) for name in shared.split()},
        rest=rest,
        strategy=entry.strategy,
        options=entry.options,
    )


def make_plans(config: SearchCostConfig) -> dict[str, Plan]:
    """One plan per `rest`, sharing model and data set."""
    clip, dataset, plans = load_clip(config.model, config.pretrained, config.device), None, {}
    for rest in config.rest:
        plans[rest] = make_plan(_search_config(config, rest), clip, dataset)
        dataset = plans[rest].dataset
    return plans


def make_bench(config: SearchCostConfig, plans: dict[str, Plan]) -> Bench:
    """Rows and images; with stores for a `rest`, the images that all of these hold.

    Raises: RankingMismatch for a store that does not fit; UserError if no image is left.
    """
    stores = read_stores(config.stores, next(iter(plans.values())), config.partial)
    for folder, store in zip(config.stores, stores):
        if store.request["criterion"] != config.criterion:
            raise UserError(f"{folder}: made with criterion {store.request['criterion']}; give --criterion the same")
    names = [EXACT, *(name for name in config.strategies if name != EXACT)]
    names += [name for name in map(_name, stores) if name not in names]
    bench = Bench(plans, {}, list(dict.fromkeys(names)), {}, {})
    for store in stores:
        bench.stored.setdefault((store.request["rest"], _name(store)), {}).update(by_image(store))
    for rest, plan in plans.items():
        held = {name: orders for (store_rest, name), orders in bench.stored.items() if store_rest == rest}
        bench.images[rest] = [item for item in plan.items if all(item.id in orders for orders in held.values())]
        if not bench.images[rest]:
            raise UserError(
                f"--stores under {rest}: hold none of the {len(plan.items)} images; "
                "give --limit the number that they were made with, or leave that --rest out"
            )
        bench.stored_macs.update({(rest, name): strategy_cost(bench.job(rest, name)).macs for name in held})
    return bench


def _name(store: RankingStore) -> str:
    return entry_of(store.request)


def resume_key(plan: Plan) -> dict:
    """What must be equal for a run to go on where another stopped; images, rows and both kinds of `rest` may grow."""
    free = ("images", "rest", "strategy", "options", "shard_size")
    return {name: value for name, value in plan.request.items() if name not in free}


def _origin(config: SearchCostConfig, plan: Plan, load: float) -> dict:
    return {
        "command": command("eval"),
        "versions": versions(),
        "machine": machine(),
        "load_average_before_timing": load if config.time else None,
        "settings": resume_key(plan)
        | {"model": Path(config.model).name, "stores": [path.name for path in config.stores]},
    }


def _bar(what: str, total: int) -> tqdm:
    form = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} images, {elapsed} so far, {remaining} left"
    return tqdm(total=total, bar_format=form, desc=f"search-cost ({what})")
