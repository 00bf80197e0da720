"""Recipes of pretraining, one row each: which patches the image tower sees at which step.

`python -m patchrank.pretrain --recipe <row>`; a new recipe is a new row here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """What the image tower sees of a picture: the best `keep` (0, 1] of the patches under one of MASKERS."""

    masker: str
    keep: float


EVERYTHING = View("random", 1.0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One row of RECIPES."""

    view: View
    """What the tower sees in the main part of a run."""
    tuning: float = 0.0
    """Share of the steps, the last ones, in which it sees everything."""
    source: str


RECIPES: dict[str, Recipe] = {
    "clip": Recipe(view=EVERYTHING, source="Radford et al. 2021"),
    "flip50": Recipe(view=View("random", 0.5), tuning=0.1, source="FLIP: Li et al. 2023, section 3"),
}
"""clip on digits, all defaults (`python -m patchrank.pretrain --recipe clip --data digits`) made the embedded model:
5,000 steps of 64, seed 0, 53 processor minutes on two shared cores (33 by the clock), zero-shot 86.5 % on val (1,000
canvases) and 88.2 % on test (2,000). Its curriculum and cheap start come before the row's own view (`config.py`)."""


def view_at(step: int, num_steps: int, recipe: Recipe, start: float, start_keep: float) -> View:
    """What the tower sees at a step: first the cheap start, then the recipe's view, then everything.

    Args: `start` share of the steps [0, 1) with only the `start_keep` patches of most contrast; 0 <= step < num_steps.
    """
    if step < round(start * num_steps):
        return View("contrast", start_keep)
    return EVERYTHING if step >= num_steps - round(recipe.tuning * num_steps) else recipe.view
