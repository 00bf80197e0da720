"""`python -m eval compare`: training-free ways to spend fewer MACs, side by side at equal MACs on the same images.

Letters: B batch, D feature, Y classes.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from eval.compare_report import text_table, write_report
from eval.compare_rows import DENSE, Unreached, make_rows
from eval.journal import Journal
from eval.rivals import OURS, RIVALS, TRAINING_FREE, Rival, build
from patchrank.atomic import write_json
from patchrank.data import batches
from patchrank.errors import UserError
from patchrank.presets import check_macs
from patchrank.provenance import command, machine, versions
from patchrank.search.config import SearchConfig, SplitConfig, check
from patchrank.search.plan import Plan, make_plan, threads
from patchrank.search.store import check_request

Cell = tuple[str, float]
"""(row of `RIVALS`, budget)."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(SplitConfig):
    """Our one-line pruning beside ToMe, EViT and other rivals at equal MACs: cosine, agreement, accuracy."""

    macs: tuple[float, ...] = (0.70, 0.56, 0.45)
    """Budgets: shares of the dense image tower's MACs, its last block computing the class row only."""
    rivals: tuple[str, ...] = TRAINING_FREE
    """Methods to compare; "ours" is always there, differences are to it."""
    batch_size: int = 16
    """Images per call; also what a kill can cost."""
    out: Path = Path("out/compare")
    """Folder of the journal and the tables."""


def main(config: CompareConfig) -> None:
    """Measure what is missing in `--out`, then write the tables."""
    plan_config = _check(config)
    with threads(config.threads):
        plan = make_plan(plan_config)
        request = {name: plan.request[name] for name in _SAME} | {"batch_size": config.batch_size}
        check_request(config.out, request)
        built, unreached = build_all(config, plan)
        write_json(config.out / "search.json", request)
        journal = Journal(config.out / "compared.jsonl", ("batch", "rival", "macs"))
        measure(config, plan, built, journal)
        num_threads = torch.get_num_threads()
    judged = {image_id for record in journal if record["rival"] == DENSE for image_id in record["ids"]}
    if not judged:
        raise UserError(f"--data {config.data}: every image of the {len(plan.items)} is broken; choose more or others")
    rows = make_rows(journal, {cell: rival.macs for cell, rival in built.items()}, plan.clip.tower.config)
    origin = {"command": command("eval"), "versions": versions(), "machine": machine(), "threads": num_threads}
    numbers = {
        "settings": request | {"model": Path(config.model).name, "limit": config.limit},
        "num_images": len(judged),
        "broken": [item.id for item in plan.items if item.id not in judged],
        "note": plan.note,
    }
    write_report(config.out, origin | numbers, rows, unreached)
    print(text_table(rows, unreached))
    print(f"compare.json, .csv and .md in {config.out}")


_SAME = ("model", "pretrained", "weights_hash", "data", "split", "images", "num_patches")
"""What must be equal for a run to go on where another stopped; rows and budgets may grow."""


def _check(config: CompareConfig) -> SearchConfig:
    """Raises: UserError for values that need neither model nor data to be seen wrong."""
    for name in config.rivals:
        if name not in RIVALS:
            raise UserError(f"--rivals {name}: unknown; choose from {', '.join(RIVALS)}")
    if not config.macs or len(set(config.macs)) != len(config.macs):
        raise UserError(f"--macs {' '.join(map(str, config.macs))}: must be one or more different shares, as 0.7 0.56")
    for macs in config.macs:
        check_macs(macs)
    if config.batch_size < 1:
        raise UserError(f"--batch-size {config.batch_size}: must be 1 or more")
    shared = "model pretrained data data_root split limit threads device out"
    plan_config = SearchConfig(**{name: getattr(config, name) for name in shared.split()})
    check(plan_config)
    return plan_config


def build_all(config: CompareConfig, plan: Plan) -> tuple[dict[Cell, Rival], list[Unreached]]:
    """Every method at every budget, and what cannot be had, with the reason.

    Raises: UserError if our own method cannot meet a budget.
    """
    tower = plan.clip.tower
    names = [OURS, *(name for name in dict.fromkeys(config.rivals) if name != OURS)]
    built, unreached = {}, []
    for macs in config.macs:
        for name in names:
            try:
                built[name, macs] = build(name, tower, macs).eval()
            except UserError as error:
                if name == OURS:
                    raise
                unreached.append(Unreached(rival=name, macs=macs, reason=str(error)))
    return built, unreached


@torch.inference_mode()
def measure(config: CompareConfig, plan: Plan, built: dict[Cell, Rival], journal: Journal) -> None:
    """One record for every batch and method that the journal lacks."""
    form = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} images, {elapsed} so far, {remaining} left"
    dataset = replace(plan.dataset, images=plan.items)
    with tqdm(total=len(plan.items), bar_format=form, desc=f"compare ({len(built)} rows)") as bar:
        for start in range(0, len(plan.items), config.batch_size):
            stop = min(start + config.batch_size, len(plan.items))
            left = {cell: rival for cell, rival in built.items() if (start, *cell) not in journal}
            if left or (start, DENSE, 1.0) not in journal:
                for ids, image_BCHW, label_B in batches(dataset, plan.clip.preprocess, stop - start, start, stop):
                    _measure_batch(plan, left, journal, start, ids, image_BCHW.to(config.device), label_B)
            bar.update(stop - start)


def _measure_batch(plan: Plan, left: dict[Cell, Rival], journal: Journal, start: int, ids, image_BCHW, label_B) -> None:
    dense_BD = plan.clip.tower(image_BCHW).float()
    logits = plan.job.logits
    answer_B = None if logits is None else logits(dense_BD).argmax(-1)
    has_labels = logits is not None and bool((label_B >= 0).all())
    label_B = label_B.to(image_BCHW.device)
    hit = (answer_B == label_B).tolist() if has_labels else None
    if (start, DENSE, 1.0) not in journal:
        journal.add({"batch": start, "rival": DENSE, "macs": 1.0, "ids": ids, "hit": hit})
    for (name, macs), rival in left.items():
        feature_BD = rival(image_BCHW).float()
        given_B = None if logits is None else logits(feature_BD).argmax(-1)
        record = {"batch": start, "rival": name, "macs": macs}
        record["cosine"] = F.cosine_similarity(feature_BD, dense_BD, dim=-1).tolist()
        record["agrees"] = None if logits is None else (given_B == answer_B).tolist()
        record["hit"] = (given_B == label_B).tolist() if has_labels else None
        journal.add(record)
