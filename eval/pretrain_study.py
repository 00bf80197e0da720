"""`python -m eval pretrain-study`: all pretraining recipes at one budget on the same pictures; may be stopped.

A plan comes first: all recipes take steps in turns, and a recipe's number of steps is what fits into its minutes of one
processor at that speed; it is written once. Then a queue of runs, tier by tier, each a process of its own with one
thread; a run that was killed goes on where it stopped, a finished one is only read. The table and the figures are made
from the runs' files after every run.
"""

import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from eval.pretrain_study_jobs import ABLATIONS, TIERS, Job
from eval.pretrain_study_page import as_page
from eval.pretrain_study_report import as_lines, draw, study_rows, verdicts
from eval.pretrain_study_runs import run_all
from patchrank.atomic import write_bytes, write_json
from patchrank.errors import UserError
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.cost import run_macs
from patchrank.pretrain.loop import open_run, train_step
from patchrank.pretrain.rules import check
from patchrank.provenance import command, machine, versions


@dataclass(frozen=True, kw_only=True)
class PretrainStudyConfig:
    """Every pretraining recipe at the same budget: retrieval and classification against time and against MACs."""

    data: str = "digits"
    """Train pictures, as in `python -m patchrank.pretrain`; real ones: flickr8k+caltech101+food101."""
    data_root: Path | None = None
    """Folder that holds the data sets; without it $PATCHRANK_ASSETS/data."""
    tiers: tuple[int, ...] = (1, 2)
    """1: the main recipes with several seeds; 2: the others, indicative; 3: ablations of the maskers, indicative."""
    recipes: tuple[str, ...] = ()
    """Only these of the tiers' recipes; none: all."""
    minutes: tuple[float, float, float] = (30.0, 10.0, 10.0)
    """Minutes of one processor for a run of each tier."""
    seeds: tuple[int, int, int] = (2, 1, 1)
    """Runs of each recipe of each tier."""
    batch_size: int = 128
    """Pictures of a step."""
    image_size: int | None = None
    """Side of the pictures in pixels; without it the small setting's (64 patches; 112 gives 196)."""
    device: str = "cpu"
    """cpu or cuda."""
    jobs: int = 1
    """Runs at a time, one thread each."""
    rounds: int = 3
    """Timed rounds of the plan."""
    plan_only: bool = False
    """Write the plan, and the table of what is finished, and stop."""
    out: Path = Path("out/pretrain-study")
    """Folder of plan.json, the runs, and pretrain_study.json, .md and .png."""


def main(config: PretrainStudyConfig) -> None:
    """Plan, run what is left of the queue, and write the table."""
    _check(config)
    config.out.mkdir(parents=True, exist_ok=True)
    jobs = queue(config)
    plan = make_plan(config, jobs)
    for recipe, row in plan["recipes"].items():
        print(f"{recipe:14} {1000 * row['seconds_per_step']:7.0f} ms a step")
    if config.plan_only:
        write_table(config, jobs, plan)
        return
    for job in jobs:
        _check_length(config, job, plan)
    left = [job for job in jobs if not finished(config, job)]
    print(
        f"{len(jobs) - len(left)} of {len(jobs)} runs are finished; about {minutes_of(config, left):.0f} minutes to go"
    )
    write_table(config, jobs, plan)
    _work(config, jobs, left, plan)
    print(as_lines(study_rows(config.out, jobs)))


def queue(config: PretrainStudyConfig) -> list[Job]:
    """Runs in order: every recipe once before any gets its second seed."""
    jobs = []
    for tier in config.tiers:
        names = [name for name in TIERS[tier - 1] if not config.recipes or name in config.recipes]
        jobs += [Job(name, tier, seed) for seed in range(config.seeds[tier - 1]) for name in names]
    return jobs


def minutes_of(config: PretrainStudyConfig, jobs: list[Job]) -> float:
    """Expected minutes of some runs on processors of their own."""
    return sum(config.minutes[job.tier - 1] for job in jobs) / config.jobs


def finished(config: PretrainStudyConfig, job: Job) -> bool:
    """Whether a run has written its model."""
    return (config.out / "runs" / job.name / "clip.json").is_file()


def pretrain_config(config: PretrainStudyConfig, job: Job, num_steps: int) -> PretrainConfig:
    """What a run is told; checks at every quarter of it."""
    size = {} if config.image_size is None else {"image_size": config.image_size}
    recipe, masker = ABLATIONS.get(job.recipe, (job.recipe, None))
    return PretrainConfig(
        recipe=recipe, masker=masker, data=config.data, data_root=config.data_root, seed=job.seed, threads=1,
        batch_size=config.batch_size, device=config.device, num_steps=num_steps,
        num_warmup=max(1, num_steps // 30) if num_steps > 1 else 0, eval_every=max(1, num_steps // 4),
        save_every=200, cheap_start=0.0, out=config.out / "runs" / job.name, **size,
    )  # fmt: skip


def make_plan(config: PretrainStudyConfig, jobs: list[Job]) -> dict:
    """Seconds of a step by recipe, from plan.json, or measured now for those that it lacks.

    Raises: UserError if the plan on disk is for other pictures or batches.
    """
    path = config.out / "plan.json"
    setup = {"data": config.data, "batch_size": config.batch_size, "image_size": config.image_size,
             "device": config.device}  # fmt: skip
    try:
        plan = json.loads(path.read_text()) if path.is_file() else {"setup": setup, "recipes": {}}
    except ValueError as error:
        raise UserError(f"{path}: does not read ({error}); remove it, or choose another --out") from None
    if plan["setup"] != setup:
        raise UserError(f"{path}: belongs to a study with {plan['setup']}; choose another --out")
    names = [name for name in dict.fromkeys(job.recipe for job in jobs) if name not in plan["recipes"]]
    if names:
        seconds = _step_seconds(config, names)
        plan["recipes"] |= {name: {"seconds_per_step": seconds[name]} for name in names}
        write_json(path, plan)
    return plan


def num_steps(config: PretrainStudyConfig, job: Job, plan: dict) -> int:
    """Steps that fit into a run's minutes; steps of unmasked tuning count by their MACs."""
    seconds = plan["recipes"][job.recipe]["seconds_per_step"]
    probe = pretrain_config(config, job, 1000)
    share = run_macs(probe) / run_macs(replace(probe, tuning=0.0))
    return max(2, round(60 * config.minutes[job.tier - 1] / (share * seconds)))


def _check_length(config: PretrainStudyConfig, job: Job, plan: dict) -> None:
    """A finished run must have the steps of its plan (to a hundredth). Raises: UserError."""
    path, wanted = config.out / "runs" / job.name / "clip.json", num_steps(config, job, plan)
    if path.is_file():
        steps = json.loads(path.read_text())["recipe"]["settings"]["num_steps"]
        if abs(steps - wanted) > max(1, 0.01 * wanted):
            raise UserError(
                f"{path.parent}: has {steps} steps, --minutes asks for {wanted}; give the minutes that it was made "
                "with, or another --out"
            )


def _step_seconds(config: PretrainStudyConfig, names: list[str]) -> dict[str, float]:
    """Median seconds of one step, reading and cropping included, recipes in turns; on a CPU, processor time."""
    torch.set_num_threads(1)
    clock = time.perf_counter if config.device == "cuda" else time.process_time
    runs = {name: open_run(pretrain_config(config, Job(name, 0, 0), 1000)) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in tqdm(range(config.rounds + 1), desc="plan", unit="round"):
        for name, run in runs.items():
            start = clock()
            train_step(run, 500)
            if config.device == "cuda":
                torch.cuda.synchronize()
            if number > 0:
                found[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def _command(config: PretrainStudyConfig, job: Job, plan: dict) -> list[str]:
    own = pretrain_config(config, job, num_steps(config, job, plan))
    words = [sys.executable, "-m", "patchrank.pretrain"]
    for name in ("recipe", "masker", "data", "data_root", "seed", "threads", "batch_size", "device", "num_steps",
                 "num_warmup", "eval_every", "save_every", "cheap_start", "out", "image_size"):  # fmt: skip
        if getattr(own, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(own, name))]
    return words


def _work(config: PretrainStudyConfig, jobs: list[Job], left: list[Job], plan: dict) -> None:
    """Run what is left. Raises: UserError if some runs failed, when all others are done."""
    commands = {job.name: _command(config, job, plan) for job in left}
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), desc="study", unit="run") as bar:
        run_all(commands, config.out / "runs", config.jobs, bar, lambda: write_table(config, jobs, plan))
    failed = [job for job in left if not finished(config, job)]
    if failed:
        log = config.out / "runs" / f"{failed[0].name}.txt"
        raise UserError(f"{failed[0].name} and {len(failed) - 1} others failed: see {log}")


def write_table(config: PretrainStudyConfig, jobs: list[Job], plan: dict) -> None:
    """pretrain_study.json, the same as a page, and its figures, from what is finished."""
    rows = study_rows(config.out, jobs)
    origin = {"command": command("eval"), "versions": versions(), "machine": machine()}
    setup = plan["setup"] | {"minutes": list(config.minutes), "num_runs": len(jobs), "num_finished": len(rows)}
    found = {f"against_{base}": verdicts(rows, base) for base in ("clip", "aclip")}
    write_json(config.out / "pretrain_study.json", origin | setup | {"rows": rows} | found)
    write_bytes(config.out / "pretrain_study.md", as_page(rows, found, setup).encode())
    if rows:
        draw(config.out / "pretrain_study.png", rows)


def _check(config: PretrainStudyConfig) -> None:
    known = dict.fromkeys(name for names in TIERS for name in names)
    unknown = [name for name in config.recipes if name not in known]
    if unknown:
        raise UserError(f"--recipes {unknown[0]}: not in the study; choose among {', '.join(known)}")
    if not config.tiers or set(config.tiers) - {1, 2, 3}:
        raise UserError(f"--tiers {' '.join(map(str, config.tiers))}: must be some of 1, 2 and 3")
    for name in ("jobs", "rounds", "batch_size"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be 1 or more")
    for name in ("minutes", "seeds"):
        if not all(0 < value < math.inf for value in getattr(config, name)):
            raise UserError(f"--{name}: must be positive, one number for each tier")
    for job in queue(config):
        check(pretrain_config(config, job, 1000))
    if not queue(config):
        raise UserError(f"--recipes {' '.join(config.recipes)}: none of them is in the chosen tiers")
