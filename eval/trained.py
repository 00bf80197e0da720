"""`python -m eval trained`: our trained and calibrated towers beside free scorers and rivals, at equal MACs.

Every batch and method is one record of a journal, so a kill costs a batch, and rows can be added to a folder later.

Letters: B batch, D feature.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from eval.journal import Journal
from eval.probe import ProbeConfig
from eval.rival_files import parse_files
from eval.rivals import OURS, RIVALS
from eval.tables import as_text
from eval.trained_answers import open_journal, pooled_journals, with_answers
from eval.trained_methods import FREE, Entry, free_entries, rival_entries, saved_entries
from eval.trained_rows import DENSE, column, make_rows, text_lines
from patchrank.atomic import write_json
from patchrank.data import batches
from patchrank.errors import UserError
from patchrank.macs import dense_macs
from patchrank.presets import check_macs
from patchrank.provenance import command, machine, versions
from patchrank.search.config import SearchConfig, SplitConfig
from patchrank.search.config import check as check_shared
from patchrank.search.plan import Plan, make_plan, threads
from patchrank.search.store import check_request


@dataclass(frozen=True, kw_only=True)
class Measured(SplitConfig):
    """Flags of commands that put entries at several budgets side by side."""

    limit: int | None = 1000
    """Images, spread over the classes; smaller limits are nested in larger ones. None: all."""
    macs: tuple[float, ...] = (0.70, 0.56, 0.45)
    """Budgets: shares of the dense image tower's MACs, its last block computing the class row only."""
    time_batches: int = 0
    """Batches of 16 to time each method on, the median counts; 0: no times."""
    batch_size: int = 16
    """Images per call; also what a kill can cost."""


@dataclass(frozen=True, kw_only=True)
class TrainedConfig(Measured):
    """Trained and calibrated towers beside free scorers and rivals at equal MACs: cosine, agreement, accuracy."""

    trained: tuple[Path, ...] = ()
    """Folders of predictors.train (judged at every budget) and predictors.calibrate (at its own); seeds are pooled."""
    rivals: tuple[str, ...] = (OURS, "tome", "tome-2-10", "evit", "low-resolution")
    """Rows of the rivals' table; none with an empty list."""
    files: tuple[str, ...] = ()
    """Trained or searched files that some rows need, as dtem=out/dtem; rows without theirs are skipped and say so."""
    scorers: tuple[str, ...] = ("salient", "random", "checkerboard", "centre", "class-attention")
    """Free scorers under our preset, each with fold and with drop."""
    fit_limit: int | None = 4000
    """Train images of a probe on unpruned features, which answers where the model has no classes for the data, None:
    all; 0: no answers then."""
    pool: tuple[Path, ...] = ()
    """Folders of this command on other data: every row also says how it does on these images and its own together."""
    measure: bool = True
    """Measure what the journal lacks; --no-measure writes the rows of what is there, each with its number of images."""
    out: Path = Path("out/trained")
    """Folder of the journal and of predictors.json."""


_SAME = ("model", "pretrained", "weights_hash", "data", "split", "images", "num_patches")
"""What must be equal for a run to go on where another stopped; methods and budgets may grow."""


def main(config: TrainedConfig) -> None:
    """Measure what is missing in `--out`, then write the rows."""
    plan_config, files = _check(config), parse_files(config.files)
    with threads(config.threads):
        plan, request = plan_of(plan_config, config.batch_size)
        plan, probe = with_answers(plan, _probe_config(config))
        request |= {"probe": probe} if probe else {}
        check_request(config.out, request)
        others, tower = pooled_journals(config.pool, request), plan.clip.tower
        entries, missing = rival_entries(tower, config.macs, config.rivals, files)
        entries += free_entries(tower, config.macs, config.scorers)
        entries += saved_entries(plan.clip, config.macs, config.trained)
        write_json(config.out / "search.json", request)
        journal = open_journal(config.out)
        if config.measure:
            measure(config, plan, entries, journal)
        ms = time_all(config, plan, entries) if config.time_batches else {}
    rows = make_rows(journal, entries, ms, others)
    hit_I = column(journal, DENSE, 1.0, "hit")
    report = {
        "command": command("eval"),
        "versions": versions(),
        "machine": machine(),
        "settings": request | {"model": Path(config.model).name, "limit": config.limit},
        "num_images": max((row["num_images"] for row in rows), default=0),
        "dense_acc1": None if hit_I is None else hit_I.double().mean().item(),
        "dense_image_macs": dense_macs(tower.config),
        "pooled_with": list(others),
        "missing": missing,
        "rows": rows,
    }
    write_json(config.out / "predictors.json", report)
    print(as_text(["method", "MACs %", "MMAC", "cosine", "agreement %", "top-1 %"], text_lines(rows)))
    print("\n".join([*missing, f"predictors.json in {config.out}"]))


def _check(config: TrainedConfig) -> SearchConfig:
    """Raises: UserError for values that need neither model nor data to be seen wrong."""
    for flag, names, known in (("rivals", config.rivals, RIVALS), ("scorers", config.scorers, FREE)):
        for name in names:
            if name not in known:
                raise UserError(f"--{flag} {name}: unknown; choose from {', '.join(known)}")
    return check_measured(config)


def _probe_config(config: TrainedConfig) -> ProbeConfig:
    shared = "model pretrained data data_root fit_limit threads device batch_size"
    split = {} if config.split is None else {"split": config.split}
    kept = {"methods": (), "cache": config.out / "features"}
    return ProbeConfig(**{name: getattr(config, name) for name in shared.split()}, **split, **kept)


def check_measured(config: Measured) -> SearchConfig:
    """The part of the flags that plans need. Raises: UserError as `_check`."""
    for macs in config.macs:
        check_macs(macs)
    if config.batch_size < 1 or not config.macs or config.time_batches < 0:
        raise UserError(
            f"--batch-size {config.batch_size}, {len(config.macs)} budgets, --time-batches {config.time_batches}: "
            "the first two must be 1 or more, the last 0 or more"
        )
    shared = "model pretrained data data_root split limit threads device out"
    plan_config = SearchConfig(**{name: getattr(config, name) for name in shared.split()})
    check_shared(plan_config)
    return plan_config


def plan_of(plan_config: SearchConfig, batch_size: int) -> tuple[Plan, dict]:
    """Model and images, and what must be equal for a run to go on where another stopped."""
    plan = make_plan(plan_config)
    return plan, {name: plan.request[name] for name in _SAME} | {"batch_size": batch_size}


@torch.inference_mode()
def measure(config: Measured, plan: Plan, entries: Sequence[Entry], journal: Journal) -> None:
    """One record for every batch and method that the journal lacks."""
    form = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} images, {elapsed} so far, {remaining} left"
    dataset = replace(plan.dataset, images=plan.items)
    with tqdm(total=len(plan.items), bar_format=form, desc=f"{len(entries)} rows") as bar:
        for start in range(0, len(plan.items), config.batch_size):
            stop = min(start + config.batch_size, len(plan.items))
            left = [entry for entry in entries if (start, entry.key, entry.budget) not in journal]
            if left or (start, DENSE, 1.0) not in journal:
                for ids, image_BCHW, label_B in batches(dataset, plan.clip.preprocess, stop - start, start, stop):
                    records = _judge(plan, left, start, image_BCHW.to(config.device), label_B.to(config.device))
                    journal.add(records[0] | {"ids": ids}, *records[1:])
            bar.update(stop - start)


def _judge(plan: Plan, entries: Sequence[Entry], start: int, image_BCHW, label_B) -> list[dict]:
    """The unpruned tower's record of a batch, then one for each entry."""
    dense_BD, logits = plan.clip.tower(image_BCHW).float(), plan.job.logits
    known = logits is not None and bool((label_B >= 0).all())
    answer_B = None if logits is None else logits(dense_BD).argmax(-1)
    hit = (answer_B == label_B).tolist() if known else None
    records = [{"batch": start, "method": DENSE, "macs": 1.0, "hit": hit}]
    for entry in entries:
        feature_BD = entry.run(image_BCHW).float()
        given_B = None if logits is None else logits(feature_BD).argmax(-1)
        record = {"batch": start, "method": entry.key, "macs": entry.budget}
        record["cosine"] = F.cosine_similarity(feature_BD, dense_BD, dim=-1).tolist()
        record["agrees"] = None if logits is None else (given_B == answer_B).tolist()
        record["hit"] = (given_B == label_B).tolist() if known else None
        records.append(record)
    return records


@torch.inference_mode()
def time_all(config: Measured, plan: Plan, entries: Sequence[Entry]) -> dict[str, float]:
    """Median milliseconds of a batch of 16, methods in turn, so that a slow moment of the machine hits all alike."""
    image_BCHW = torch.stack([plan.clip.preprocess(plan.dataset.open(item.id)) for item in plan.items[:16]])
    image_BCHW = image_BCHW.to(config.device)
    spent: dict[str, list[float]] = {}
    for turn in range(config.time_batches + 1):
        for entry in entries:
            began = time.perf_counter()
            entry.run(image_BCHW)
            if image_BCHW.is_cuda:
                torch.cuda.synchronize()
            if turn:
                spent.setdefault(entry.timed_as, []).append(1000 * (time.perf_counter() - began))
    return {key: statistics.median(values) for key, values in spent.items()}
