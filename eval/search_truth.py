"""`python -m eval search-truth`: what golden keep sets do to accuracy, by criterion, strategy and `rest`."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from eval.journal import Journal
from eval.orders import ENTRIES, by_image, entry_of, free_orders, read_stores
from eval.quality import dense_hit, judge
from eval.truth_report import text_table, write_report
from eval.truth_rows import FREE_ROWS, TRUTH_KEEPS, make_rows
from patchrank.atomic import write_json
from patchrank.data import BrokenImage, Item
from patchrank.errors import UserError
from patchrank.loading import load_clip
from patchrank.provenance import command, machine, versions
from patchrank.search.config import SearchConfig, SplitConfig, check
from patchrank.search.criteria import CRITERIA
from patchrank.search.plan import Plan, make_plan, threads
from patchrank.search.runner import run_search, seed_of
from patchrank.search.store import RankingStore, check_request, open_store
from patchrank.search.sweep_all import run_sweep_all
from patchrank.search.variants import CHUNK, prepare
from patchrank.spec import RESTS

Key = tuple[str, str, str]
"""(rest, strategy row, criterion)."""


@dataclass(frozen=True, kw_only=True)
class SearchTruthConfig(SplitConfig):
    """Accuracy on golden keep sets: what each criterion's ranking is worth for the answer."""

    data: str = "digits"
    """Data set: a row of the catalog, or "folder"; it needs classes and labels."""
    layer: int | None = None
    """Blocks that run before the cut; without it a quarter of the depth."""
    rest: tuple[str, ...] = RESTS
    """What becomes of the patches that are not kept: fold, drop or both."""
    merge_norm: str = "preserve"
    """Norm of folded tokens: "preserve" or "mean"."""
    criteria: tuple[str, ...] = tuple(CRITERIA)
    """Criteria to search here: preservation, confidence, label (an oracle)."""
    strategies: tuple[str, ...] = ("sweep", "joint")
    """Strategies to search here, rows of search-cost; one sweep serves all criteria. Add greedy-8 if there is time."""
    stores: tuple[Path, ...] = ()
    """Ranking stores of any strategy, criterion and rest; what they hold is not searched again."""
    partial: bool = False
    """Accept --stores that are not finished; each row covers the images that its store holds."""
    seed: int = 0
    """Seed of strategies and scorers that draw."""
    chunk: int = CHUNK
    """Pruned variants per call."""
    shard_size: int = 8
    """Images per shard: what a kill can cost."""
    out: Path = Path("out/search-truth")
    """Folder of the stores, the journal, the table and the picture."""


def main(config: SearchTruthConfig) -> None:
    """Search what no store holds, judge all orders by accuracy, write the report."""
    _check(config)
    with threads(config.threads):
        base = make_plan(_search_config(config, config.rest[0], "sweep", config.criteria[0]), _clip(config))
        if base.job.logits is None or any(item.label is None for item in base.items):
            raise UserError(f"--data {config.data}: has no class labels, so there is no accuracy; choose another set")
        key = {name: value for name, value in base.request.items() if name not in _MAY_GROW}
        check_request(config.out, key)
        write_json(config.out / "search.json", key)
        given = read_stores(config.stores, base, config.partial)
        orders = {_key(store): by_image(store) for store in given}
        for rest in config.rest:
            orders |= {_key(store): by_image(store) for store in _search_missing(config, base, rest, orders)}
        journal = Journal(config.out / "judged.jsonl", ("image", "rest", "strategy", "criterion"))
        broken = judge_all(config, base, orders, journal)
        rows = make_rows(base.items, journal)
        origin = {
            "command": command("eval"),
            "versions": versions(),
            "machine": machine(),
            "settings": key | {"model": Path(config.model).name},
        }
        numbers = {"num_images": len(base.items) - len(broken), "threads": torch.get_num_threads(), "broken": broken}
        write_report(config.out, origin | numbers, rows)
    print(text_table(rows))
    print(f"search_truth.json, .csv, .md and .png in {config.out}")


_MAY_GROW = ("images", "rest", "criterion", "strategy", "options", "shard_size")


def _check(config: SearchTruthConfig) -> None:
    """Raises: UserError for values that need neither model nor data to be seen wrong."""
    for name in config.strategies:
        if name not in ENTRIES:
            raise UserError(f"--strategies {name}: unknown; choose from {', '.join(ENTRIES)}")
    if not config.rest or len(set(config.rest)) != len(config.rest) or not set(config.rest) <= set(RESTS):
        raise UserError(f"--rest {' '.join(config.rest)}: must be {RESTS[0]}, {RESTS[1]} or both")
    if not config.criteria:
        raise UserError(f"--criteria: names none; choose from {', '.join(CRITERIA)}")
    for criterion in config.criteria:
        check(_search_config(config, config.rest[0], "sweep", criterion))


def _clip(config: SearchTruthConfig):
    return load_clip(config.model, config.pretrained, config.device)


def _search_config(config: SearchTruthConfig, rest: str, row: str, criterion: str) -> SearchConfig:
    shared = "model pretrained data data_root split limit layer merge_norm seed chunk shard_size threads device out"
    entry = ENTRIES[row]
    return SearchConfig(
        **{name: getattr(config, name) for name in shared.split()},
        rest=rest,
        criterion=criterion,
        strategy=entry.strategy,
        options=entry.options,
    )


def _key(store: RankingStore) -> Key:
    return store.request["rest"], entry_of(store.request), store.request["criterion"]


def _search_missing(config: SearchTruthConfig, base: Plan, rest: str, known: dict[Key, dict]) -> list[RankingStore]:
    """Search under one `rest` what no given store holds, into <out>/stores; resumes."""
    found = []
    for row in config.strategies:
        left = [criterion for criterion in config.criteria if (rest, row, criterion) not in known]
        plans = {
            criterion: make_plan(_search_config(config, rest, row, criterion), base.clip, base.dataset)
            for criterion in left
        }
        folders = {criterion: config.out / "stores" / f"{row}-{criterion}-{rest}" for criterion in left}
        if row == "sweep" and left:
            run_sweep_all(plans, folders)
        elif left:
            for criterion, plan in plans.items():
                run_search(plan.job, plan.items, plan.request, folders[criterion])
        found += [open_store(folder) for folder in folders.values()]
    return found


@torch.no_grad()
def judge_all(config: SearchTruthConfig, base: Plan, orders: dict[Key, dict], journal: Journal) -> list[str]:
    """Accuracy and cosine of every order of every image at `TRUTH_KEEPS`, into the journal; ids of broken images."""
    form = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} images, {elapsed} so far, {remaining} left"
    broken = []
    for item in tqdm(base.items, bar_format=form, desc="search-truth (accuracy)"):
        wanted = {key: held[item.id] for key, held in orders.items() if item.id in held and key[0] in config.rest}
        wanted |= {(rest, name, ""): None for rest in config.rest for name in FREE_ROWS}
        left = {key: order_N for key, order_N in wanted.items() if (item.id, *key) not in journal}
        if not left:
            continue
        try:
            image_CHW = base.job.image(item).to(base.job.device)
        except BrokenImage:
            broken.append(item.id)
            continue
        _judge_image(base, item, image_CHW, left, journal)
    return broken


def _judge_image(base: Plan, item: Item, image_CHW: torch.Tensor, left: dict, journal: Journal) -> None:
    records = []
    for rest in dict.fromkeys(key[0] for key in left):
        job = replace(base.job, spec=replace(base.job.spec, rest=rest))
        variants = prepare(job.tower, image_CHW, job.spec, job.chunk)
        for (key_rest, strategy, criterion), order_N in left.items():
            if key_rest != rest:
                continue
            seed = seed_of(job.seed, item.id)
            order_RN = free_orders(variants, strategy, seed) if order_N is None else order_N.unsqueeze(0)
            worth = judge(job, variants, item.label, order_RN, TRUTH_KEEPS)
            record = {"image": item.id, "rest": rest, "strategy": strategy, "criterion": criterion}
            records.append(record | asdict(worth))
    hit = dense_hit(job, variants, item.label)
    dense = {"image": item.id, "rest": "", "strategy": "dense", "criterion": "", "hit": hit}
    journal.add(dense, *records)
