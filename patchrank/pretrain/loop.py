"""The training loop: step, guard, check, save; the same command goes on after a kill with the same bytes."""

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from patchrank.data import Dataset
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess
from patchrank.pretrain.ahead import Ahead
from patchrank.pretrain.batches import Batches
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.curriculum import CURRICULA, Pace
from patchrank.pretrain.distributed import World, barrier, sum_over_ranks, with_joined_norms
from patchrank.pretrain.draws import generator
from patchrank.pretrain.evaluate import Look, check_pair, open_checks
from patchrank.pretrain.journal import RunLog
from patchrank.pretrain.learner import Learner
from patchrank.pretrain.locked import Locked, locked_start
from patchrank.pretrain.meter import Meter
from patchrank.pretrain.model import build_pair, parameter_groups
from patchrank.pretrain.pairs import SHARDS, load_pairs
from patchrank.pretrain.pictures import Pictures
from patchrank.pretrain.schedule import learning_rate
from patchrank.pretrain.shards import ShardStream, shard_paths
from patchrank.pretrain.state import Progress, load_state, save_state
from patchrank.pretrain.threshold import with_threshold


def state_path(out: Path) -> Path:
    """Where a run keeps its state."""
    return out / "state.safetensors"


@dataclass
class Run:
    """A run in memory: all that `train` changes, and what it reads."""

    config: PretrainConfig
    learner: Learner
    wrapped: nn.Module
    """The learner itself, or the learner under DDP."""
    optimiser: torch.optim.Optimizer
    batches: Batches
    preprocess: Preprocess
    progress: Progress
    ahead: Ahead | None = None
    """Draws batches beside the training, with --workers."""
    world: World = field(default_factory=World)
    locked: Locked | None = None
    """The image tower of a locked run."""
    checks: list[Pictures] | None = None
    """Data sets of the checks, opened at the first one."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the last check found."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What must not change when the run is taken up again."""

    @property
    def pair(self):
        """The towers."""
        return self.learner.pair

    @property
    def look(self) -> Look | None:
        """Where checks take features from that need not be computed again; None: from the towers."""
        return None if self.locked is None else self.locked.look


def open_run(config: PretrainConfig, world: World | None = None) -> Run:
    """Fresh towers, or those of the state in --out. Raises: UserError for data or a state that does not fit."""
    world = world or World()
    device = f"cuda:{world.local_rank}" if config.device == "cuda" else "cpu"
    stream = config.data == SHARDS
    source = ShardStream(shard_paths(config.data_root), config.seed, world) if stream else None
    source = source or load_pairs(config.data, root=config.data_root, split="train")
    config = with_threshold(config, source, state_path(config.out), world, device)
    preprocess, locked, feature_ND = config.preprocess(), None, None
    if config.row.locked:
        pair, locked = locked_start(config, device)
        preprocess = locked.preprocess
        if not stream and not config.dry_run:
            feature_ND = locked.train_features(source, world)
    else:
        pair = build_pair(config.tower_config(), config.text_config(), config.seed, config.start).to(device)
        pair.tower.patch.requires_grad_(not config.frozen_patches)
    batches = Batches(config, source, preprocess, world, feature_ND)
    learner = Learner(pair, config, config.seed, alone=world.size == 1).to(device)
    if world.size > 1 and config.device == "cuda":
        learner = with_joined_norms(learner)
    groups = parameter_groups(learner, config.weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), eps=config.epsilon)
    progress, settings = Progress(), _settings(config, world, source)
    if state_path(config.out).exists():
        progress = load_state(state_path(config.out), learner, optimiser, settings)
    wrapped = learner if world.size == 1 else DistributedDataParallel(learner)
    ahead = Ahead(batches) if config.workers else None
    return Run(
        config, learner, wrapped, optimiser, batches, preprocess, progress, ahead, world, locked, settings=settings
    )


def _settings(config: PretrainConfig, world: World, source: Dataset | ShardStream) -> dict[str, Any]:
    """What must not change within a run: each process has masks, noise and batch norms of its own."""
    names = source.names if isinstance(source, ShardStream) else [item.id for item in source.images]
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]
    return config.settings() | {"processes": world.size, "pictures": digest}


def difficulty_at(config: PretrainConfig, step: int, pace: Pace) -> float:
    """The curriculum's difficulty while it lasts, then 1."""
    applies = config.data in CURRICULA and step < round(config.curriculum * config.num_steps)
    return pace.difficulty if applies else 1.0


def train_step(run: Run, step: int) -> dict[str, float]:
    """One step; changes the learner, the optimiser and the pace. Returns the losses by name, "hits", "norm", "lr".

    Raises: UserError if loss or gradient is not finite; weights and teacher are then as they were.
    """
    config, progress = run.config, run.progress
    rate = learning_rate(step, config.num_steps, config.lr, config.num_warmup, config.decay, config.lr_end)
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    recipe = config.row
    views = recipe.views_at(step, config.num_steps, config.cheap_start, config.cheap_keep, config.tuning)
    difficulty, done = difficulty_at(config, step, progress.pace), step / max(1, config.num_steps - 1)
    run.optimiser.zero_grad(set_to_none=True)
    totals, ids = {}, []
    for part in range(config.accumulate):
        batch = (run.ahead or run.batches).at(step, difficulty, part)
        last = part == config.accumulate - 1
        ids += batch.ids
        with nullcontext() if last or run.world.size == 1 else run.wrapped.no_sync():
            found = run.wrapped(batch, views, done, _chance(run, step, part))
            (found["loss"] if config.accumulate == 1 else found["loss"] / config.accumulate).backward()
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + value.item() / config.accumulate
    norm = _gradient_norm(run)
    if not (math.isfinite(totals["loss"]) and math.isfinite(norm)):
        raise _not_finite(step, totals["loss"], norm, ids)
    run.optimiser.step()
    run.pair.clamp_scale()
    run.learner.follow(step)
    if run.world.size > 1:
        device = run.pair.log_scale.device
        totals = {name: sum_over_ranks(value, device) / run.world.size for name, value in totals.items()}
    run.progress = replace(progress, step=step + 1, pace=progress.pace.after(totals["hits"]))
    return totals | {"norm": norm, "lr": rate}


def _chance(run: Run, step: int, part: int) -> torch.Generator:
    """Chance of a part's masks, on the device; one process without accumulation draws from one stream of its own."""
    number = run.world.rank * run.config.accumulate + part
    purpose = f"mask {number}" if run.batches.num_parts > 1 else "mask"
    return generator(run.config.seed, purpose, step, run.pair.log_scale.device)


def _gradient_norm(run: Run) -> float:
    """Norm of the whole gradient, which is clipped where the config says so."""
    parameters = [parameter for parameter in run.learner.parameters() if parameter.requires_grad]
    limit = run.config.max_norm or math.inf
    return torch.nn.utils.clip_grad_norm_(parameters, limit).item()


def _not_finite(step: int, loss: float, norm: float, ids: list[str]) -> UserError:
    shown = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
    return UserError(
        f"step {step}: loss {loss:g}, gradient norm {norm:g}: both must be finite; its batch: {shown}; the last state "
        "on disk is sound: give a lower --lr and another --out, or mend the pictures"
    )


def train(run: Run, until: Callable[[Progress], bool] | None = None) -> None:
    """All steps that are left, with checks, log rows and states on disk as the config asks; checks are not timed.

    Args: until: stop after a step for which this holds; its state is then on disk.
    """
    config, start = run.config, run.progress
    wall, cpu = time.monotonic(), time.process_time()
    bar = tqdm(total=config.num_steps * config.batch_size, initial=start.step * config.batch_size, unit=" images",
               unit_scale=True, smoothing=0.05, desc=config.recipe, disable=not run.world.leads)  # fmt: skip
    log = RunLog(config.out, start.step, config.tensorboard) if run.world.leads else None
    meter, rates = Meter(config, run.learner), ""
    with bar:
        for step in range(start.step, config.num_steps):
            found = train_step(run, step)
            meter.count(step)
            seconds, cpu_seconds = time.monotonic() - wall, time.process_time() - cpu
            run.progress = replace(
                run.progress, seconds=start.seconds + seconds, cpu_seconds=start.cpu_seconds + cpu_seconds
            )
            done = step + 1
            stops = done == config.num_steps or (until is not None and until(run.progress))
            now = f"loss {found['loss']:.2f}, hits {run.progress.pace.hits:.2f}"
            bar.set_postfix_str(now + rates, refresh=False)
            bar.update(config.batch_size)
            if log and (done % config.log_every == 0 or stops):
                speed = meter.read()
                rates = f", {speed['tokens_per_s']:.0f} tokens/s, teacher {100 * speed['teacher_share']:.0f} %"
                log.add(done, found | speed | {"scale": run.pair.log_scale.exp().item()})
            if done % config.save_every == 0 or stops:
                save(run)
            if done % config.eval_every == 0 or stops:
                pause = time.monotonic(), time.process_time()
                run.metrics = check_run(run)
                if log and run.metrics:
                    log.add(done, run.metrics)
                said = ", ".join(f"{name} {100 * value:.1f} %" for name, value in run.metrics.items())
                if run.world.leads:
                    bar.write(
                        f"step {done}: {now}; {said or 'no checks'}; {run.progress.cpu_seconds:.0f} s of processor"
                    )
                wall, cpu = wall + time.monotonic() - pause[0], cpu + time.process_time() - pause[1]
                meter.skip(time.monotonic() - pause[0])
            if stops:
                break
    if log:
        log.close()


def save(run: Run) -> None:
    """The run's state on disk, by the process that leads."""
    if run.world.leads:
        save_state(state_path(run.config.out), run.learner, run.optimiser, run.progress, run.settings)
    barrier()


def check_run(run: Run) -> dict[str, float]:
    """Zero-shot accuracy and retrieval on the check split; empty where there is nothing to check, or elsewhere."""
    config = run.config
    if not run.world.leads:
        barrier()
        return {}
    if run.checks is None:
        run.checks = open_checks(config, config.eval_split, run.preprocess)
    found = check_pair(run.pair, run.checks, run.preprocess, min(config.batch_size, 256), run.look)
    barrier()
    return found
