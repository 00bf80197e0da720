"""The training loop: steps, checkpoints, judgement on held-out images; killed and resumed, it ends with the same bits.

Every draw is a function of seed and step, so weights, optimiser state and the step number are the whole state. The
best weights on the held-out images are kept beside the current ones and win in the end. Several processes see a part of
each batch and average their gradients; all judge alike, one writes.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from patchrank.errors import UserError
from patchrank.pretrain.distributed import ALONE, World, average_, barrier
from patchrank.pretrain.journal import RunLog
from predictors.state import load_state, save_state

logger = logging.getLogger(__name__)

STATE = "state.safetensors"
"""File of a run inside its folder."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained and how it is judged."""

    learned: nn.Module
    """Holds exactly the parameters that are trained."""
    loss: Callable[[int], tuple[Tensor, dict[str, float]]]
    """Step -> scalar loss with a gradient, and numbers for the log."""
    judge: Callable[[], dict[str, float]]
    """Numbers on held-out images, `distance` among them; of the weights as they are now."""
    batch_name: Callable[[int], str]
    """Step -> the images of its batch, for messages."""
    aim: Callable[[dict[str, float]], float] = itemgetter("distance")
    """What `judge` found -> the number by which the best weights are chosen: the least."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long and how fast."""

    num_steps: int
    lr: float
    weight_decay: float = 0.0
    num_warmup: int = 10
    save_every: int = 50
    patience: int = 0
    """Judgements without progress after which training stops; 0: never."""

    @classmethod
    def of(cls, config: object) -> "Course":
        """The course that a command's flags of the same names ask for."""
        return cls(**{one.name: getattr(config, one.name) for one in fields(cls) if hasattr(config, one.name)})


class _Kept(nn.Module):
    """The trained module with a copy of its best weights and how good they were; the whole is one state dict."""

    def __init__(self, learned: nn.Module) -> None:
        super().__init__()
        self.learned = learned
        for name, parameter in learned.named_parameters():
            self.register_buffer(f"best_{name.replace('.', '/')}", parameter.detach().clone())
        self.register_buffer("best_aim", torch.tensor(math.inf, dtype=torch.float64))
        self.register_buffer("num_stale", torch.tensor(0))

    @torch.no_grad()
    def offer(self, aim: float) -> None:
        """Remember the current weights if they are better than the best so far."""
        if aim < self.best_aim.item():
            self.best_aim.fill_(aim)
            self.num_stale.fill_(0)
            for name, parameter in self.learned.named_parameters():
                self.get_buffer(f"best_{name.replace('.', '/')}").copy_(parameter)
        else:
            self.num_stale += 1

    @torch.no_grad()
    def restore_best(self) -> None:
        for name, parameter in self.learned.named_parameters():
            parameter.copy_(self.get_buffer(f"best_{name.replace('.', '/')}"))


def learning_rate(step: int, course: Course) -> float:
    """Rate of step 0 .. num_steps-1: linear up to the peak, then half a cosine down to zero.

    Source: Loshchilov & Hutter 2017 (SGDR), equation 5, without restarts.
    """
    num_warmup = min(course.num_warmup, course.num_steps - 1)
    if step < num_warmup:
        return course.lr * (step + 1) / (num_warmup + 1)
    return course.lr * 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (course.num_steps - num_warmup)))


def _step(task: Task, optimiser: torch.optim.Optimizer, step: int, rate: float, folder: Path) -> dict[str, float]:
    """One step. Raises: UserError for a loss or gradient that is not finite, before any weight has changed."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss, numbers = task.loss(step)
    loss.backward()
    parameters = [parameter for parameter in task.learned.parameters() if parameter.grad is not None]
    numbers = {"loss": loss.item(), **numbers}
    value_M = torch.tensor(list(numbers.values()), dtype=torch.float64, device=loss.device)
    average_([parameter.grad for parameter in parameters] + [value_M])
    numbers = dict(zip(numbers, value_M.tolist()))
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    if not (math.isfinite(numbers["loss"]) and math.isfinite(norm.item())):
        raise UserError(
            f"step {step}: the loss is {numbers['loss']}, its gradient {norm.item()}, for the batch "
            f"{task.batch_name(step)}; {folder / STATE} holds the last good weights; lower --lr or look at these images"
        )
    optimiser.step()
    return numbers


def fit(
    task: Task,
    course: Course,
    folder: Path,
    settings: dict[str, Any],
    *,
    quiet: bool = True,
    tensorboard: bool = False,
    world: World = ALONE,
) -> dict[str, Any]:
    """Train `task.learned` in place, from the start or from the state in `folder`, and leave it with its best weights.

    Args: settings: JSON values that must be equal when a run is taken up again; tensorboard: write event files too.
    Returns: `log` (list of entries), `steps` done, `seconds` spent, `best_aim`.
    Raises: UserError for a state of other settings, for numbers that are not finite, for too little memory.
    """
    kept = _Kept(task.learned)
    optimiser = torch.optim.AdamW(task.learned.parameters(), lr=course.lr, weight_decay=course.weight_decay)
    step, seconds, log = 0, 0.0, []
    if (folder / STATE).is_file():
        progress = load_state(folder / STATE, kept, optimiser, settings)
        step, seconds, log = progress["step"], progress["seconds"], progress["log"]
        logger.info("going on after step %d of %d", step, course.num_steps)
    else:
        kept.offer(task.aim(task.judge()))
    events = RunLog(folder, step, tensorboard=True) if tensorboard and world.leads else None
    began = time.perf_counter() - seconds
    means: dict[str, list[float]] = {}
    form = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {rate_noinv_fmt}, {remaining} left{postfix}"
    with tqdm(
        total=course.num_steps, initial=step, unit=" steps", bar_format=form, disable=quiet, desc="training"
    ) as bar:
        while step < course.num_steps and not _stale(kept, course):
            try:
                numbers = _step(task, optimiser, step, learning_rate(step, course), folder)
            except (MemoryError, RuntimeError) as error:
                raise _out_of_memory(error) from error
            for name, value in numbers.items():
                means.setdefault(name, []).append(value)
            step += 1
            bar.update()
            if step % course.save_every == 0 or step == course.num_steps:
                found = task.judge()
                kept.offer(task.aim(found))
                log.append({"step": step} | {k: sum(v) / len(v) for k, v in means.items()} | {"held_out": found})
                means.clear()
                bar.set_postfix_str(f", held-out 1 - cosine {found['distance']:.4f}")
                if world.leads:
                    progress = {"step": step, "seconds": time.perf_counter() - began, "log": log}
                    save_state(folder / STATE, kept, optimiser, progress, settings)
                if events is not None:
                    events.add(step, _flat(log[-1]))
                barrier()
    if events is not None:
        events.close()
    kept.restore_best()
    best = kept.best_aim.item()
    return {"log": log, "steps": step, "seconds": round(time.perf_counter() - began, 1), "best_aim": best}


def _flat(entry: dict[str, Any]) -> dict[str, float]:
    """{"loss": 1, "held_out": {"cosine": 2}} -> {"loss": 1, "held_out/cosine": 2}; the step is said apart."""
    found = {name: value for name, value in entry.items() if name not in ("step", "held_out")}
    return found | {f"held_out/{name}": value for name, value in entry["held_out"].items()}


def _stale(kept: _Kept, course: Course) -> bool:
    return 0 < course.patience <= kept.num_stale.item()


def _out_of_memory(error: Exception) -> Exception:
    """A word about memory where that is the reason, else the error itself."""
    words = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words:
        return UserError("out of memory in a training step: lower --batch-size, or --limit for a smaller cache")
    return error
