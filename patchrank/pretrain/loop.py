"""The training loop: step, guard, check, save; the same command goes on after a kill with the same bytes.

Letters: B pictures, U distinct texts, D feature.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from patchrank.data import load_dataset
from patchrank.errors import UserError
from patchrank.pretrain.batches import Batch, Batches
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.curriculum import CURRICULA, Pace
from patchrank.pretrain.draws import generator
from patchrank.pretrain.evaluate import zero_shot_accuracy
from patchrank.pretrain.maskers import encode
from patchrank.pretrain.model import Pair, build_pair, parameter_groups
from patchrank.pretrain.objectives import contrastive_loss
from patchrank.pretrain.pictures import Pictures
from patchrank.pretrain.recipes import RECIPES, View, view_at
from patchrank.pretrain.schedule import learning_rate
from patchrank.pretrain.state import Progress, load_state, save_state
from patchrank.text import PAD, tokenize

_MAX_NORM = 1.0
"""Limit of the gradient's norm."""


def state_path(out: Path) -> Path:
    """Where a run keeps its state."""
    return out / "state.safetensors"


def forward(pair: Pair, batch: Batch, view: View, mask: torch.Generator) -> tuple[Tensor, float]:
    """Loss (scalar) of a batch, and the share of its pictures whose nearest text is true for them."""
    device = pair.log_scale.device
    token_UL = tokenize(batch.texts, pair.text.config.context)
    token_UL = token_UL[:, : int((token_UL != PAD).sum(1).max())]
    text_UD = F.normalize(pair.text(token_UL.to(device)), dim=-1)
    image_BD = F.normalize(encode(pair.tower, batch.image_BCHW.to(device), view.masker, view.keep, mask), dim=-1)
    positive_BU = batch.positive_BU.to(device)
    loss = contrastive_loss(image_BD, text_UD, positive_BU, batch.count_U.to(device), pair.log_scale.exp())
    with torch.no_grad():
        nearest_B1 = (image_BD @ text_UD.T).argmax(1, keepdim=True)
        hits = float(positive_BU.gather(1, nearest_B1).float().mean())
    return loss, hits


def update(pair: Pair, optimiser: torch.optim.Optimizer, loss: Tensor, step: int) -> None:
    """Backward pass, clipped to norm 1, and one step of the optimiser.

    Raises: UserError if loss or gradient is not finite; weights are then as they were.
    """
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(pair.parameters(), _MAX_NORM)
    if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
        raise UserError(
            f"step {step}: loss {loss.item():g}, gradient norm {norm.item():g}: both must be finite; give a lower --lr "
            "and another --out (the last state on disk is sound)"
        )
    optimiser.step()
    pair.clamp_scale()


@dataclass
class Run:
    """A run in memory: all that `train` changes, and what it reads."""

    config: PretrainConfig
    pair: Pair
    optimiser: torch.optim.Optimizer
    batches: Batches
    val: Pictures | None
    """Labelled pictures for checks; None where the data set has no classes."""
    progress: Progress


def open_run(config: PretrainConfig) -> Run:
    """Fresh towers, or those of the state in --out. Raises: UserError for data or a state that does not fit."""
    preprocess = config.preprocess()
    batches = Batches(config, load_dataset(config.data, root=config.data_root, split="train"), preprocess)
    has_classes = bool(batches.pictures.dataset.class_names)
    val = Pictures(load_dataset(config.data, root=config.data_root, split="val"), preprocess) if has_classes else None
    pair = build_pair(config.tower_config(), config.text_config(), config.seed).to(config.device)
    optimiser = torch.optim.AdamW(parameter_groups(pair, config.weight_decay), lr=config.lr, betas=(0.9, 0.98))
    progress = Progress()
    if state_path(config.out).exists():
        progress = load_state(state_path(config.out), pair, optimiser, config.settings())
    return Run(config, pair, optimiser, batches, val, progress)


def difficulty_at(config: PretrainConfig, step: int, pace: Pace) -> float:
    """The curriculum's difficulty while it lasts, then 1."""
    applies = config.data in CURRICULA and step < round(config.curriculum * config.num_steps)
    return pace.difficulty if applies else 1.0


def train_step(run: Run, step: int) -> float:
    """One step; changes the pair, the optimiser and the pace. Returns the loss."""
    config, recipe = run.config, RECIPES[run.config.recipe]
    for group in run.optimiser.param_groups:
        group["lr"] = learning_rate(step, config.num_steps, config.lr, config.num_warmup, config.decay)
    batch = run.batches.at(step, difficulty_at(config, step, run.progress.pace))
    view = view_at(step, config.num_steps, recipe, config.cheap_start, config.cheap_keep)
    loss, hits = forward(run.pair, batch, view, generator(config.seed, "mask", step))
    update(run.pair, run.optimiser, loss, step)
    run.progress = replace(run.progress, step=step + 1, pace=run.progress.pace.after(hits))
    return loss.item()


def train(run: Run) -> None:
    """All steps that are left, with checks, log lines and states on disk as the config asks."""
    config, start = run.config, run.progress
    wall, cpu = time.monotonic(), time.process_time()
    bar = tqdm(total=config.num_steps * config.batch_size, initial=start.step * config.batch_size,
               unit=" images", unit_scale=True, smoothing=0.05, desc=config.recipe)  # fmt: skip
    with bar:
        for step in range(start.step, config.num_steps):
            loss = train_step(run, step)
            seconds, cpu_seconds = time.monotonic() - wall, time.process_time() - cpu
            run.progress = replace(
                run.progress, seconds=start.seconds + seconds, cpu_seconds=start.cpu_seconds + cpu_seconds
            )
            done, pace = step + 1, run.progress.pace
            now = f"loss {loss:.2f}, hits {pace.hits:.2f}, difficulty {pace.difficulty:.2f}"
            bar.set_postfix_str(now, refresh=False)
            bar.update(config.batch_size)
            if done % config.eval_every == 0 or done == config.num_steps:
                accuracy = check_run(run)
                said = f"val accuracy {100 * accuracy:.1f} %, {run.progress.cpu_seconds:.0f} s of processor"
                bar.write(f"step {done}: {now}, {said}")
            if done % config.save_every == 0 or done == config.num_steps:
                save_state(state_path(config.out), run.pair, run.optimiser, run.progress, config.settings())


def check_run(run: Run) -> float:
    """Zero-shot accuracy on val in [0, 1]; NaN without classes."""
    if run.val is None:
        return float("nan")
    return zero_shot_accuracy(run.pair, run.val, run.config.preprocess(), run.config.batch_size)
