"""Training of one prompt on a few labelled images, and what it answers on test images.

Letters: B batch, I images, T tokens, Y classes, D feature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.pretrain.draws import sampler
from patchrank.pruned import PrunedTower
from patchrank.tower import VisionTower
from predictors.fit import Course, Task, fit
from predictors.prompt_table import Cell, hits
from predictors.prompt_text import PromptedClasses
from predictors.prompt_tower import Prompt, prompted_feature, with_tokens

Prune = Callable[[VisionTower], VisionTower | PrunedTower]
"""Tower -> the tower of a row: as it is, or pruned."""


@dataclass(frozen=True)
class Shots:
    """Labelled images in memory."""

    image_ICHW: Tensor
    label_I: Tensor


@dataclass(frozen=True)
class Setting:
    """What all prompts of a run share."""

    tower: VisionTower
    classes: PromptedClasses
    logit_scale: float
    course: Course
    batch_size: int


@torch.no_grad()
def features(module: Callable[[Tensor], Tensor], image_ICHW: Tensor, batch_size: int) -> Tensor:
    """Unit features (I, D) float32."""
    parts = [F.normalize(module(part).float(), dim=-1) for part in image_ICHW.split(batch_size)]
    return torch.cat(parts)


def train(
    setting: Setting,
    cell: Cell,
    prune: Prune,
    shots: Shots,
    seed: int,
    folder: Path,
    settings: dict[str, Any],
) -> Prompt:
    """A prompt for one row, by cross-entropy on `shots`; goes on with the state in `folder`.

    The weights of the lowest cross-entropy over all shots win; no other image is looked at.
    """
    tower, classes = setting.tower, setting.classes
    prompt = Prompt(classes.start(seed), tower.config.width if cell.visual else None, seed)
    fixed_ID = None
    if not cell.visual:
        fixed_ID = features(prune(tower), shots.image_ICHW, setting.batch_size)
    else:
        roomy = prune(with_tokens(tower, torch.zeros(classes.num_tokens, tower.config.width)))

    def logits(index_B: Tensor) -> Tensor:
        if fixed_ID is not None:
            unit_BD = fixed_ID[index_B]
        else:
            unit_BD = F.normalize(prompted_feature(roomy, prompt, shots.image_ICHW[index_B]).float(), dim=-1)
        return setting.logit_scale * unit_BD @ classes(prompt.text_TE).T

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        index_B = sampler(len(shots.label_I), min(setting.batch_size, len(shots.label_I)), seed, step)
        value = F.cross_entropy(logits(index_B), shots.label_I[index_B])
        return value, {"cross_entropy": value.item()}

    @torch.no_grad()
    def judge() -> dict[str, float]:
        index_I = torch.arange(len(shots.label_I), device=shots.label_I.device)
        found_IY = torch.cat([logits(part) for part in index_I.split(setting.batch_size)])
        return {"distance": F.cross_entropy(found_IY, shots.label_I).item()}

    task = Task(learned=prompt, loss=loss, judge=judge, batch_name=lambda step: f"of step {step}")
    fit(task, setting.course, folder, settings | {"row": cell.name, "seed": seed})
    return prompt.requires_grad_(False)


def tuned(setting: Setting, prune: Prune, prompt: Prompt) -> VisionTower | PrunedTower:
    """The tower of a row with what the prompt adds to it."""
    return prune(setting.tower if prompt.map_CE is None else with_tokens(setting.tower, prompt.visual()))


@torch.no_grad()
def hits_of(module: Callable[[Tensor], Tensor], class_YD: Tensor, test: Shots, batch_size: int) -> Tensor:
    """1 for every test image whose nearest class is its own, else 0; float (I,)."""
    return hits(features(module, test.image_ICHW, batch_size) @ class_YD.T, test.label_I)
