"""What the study runs: three tiers of recipes, and one run of them."""

from dataclasses import dataclass

from patchrank.pretrain.recipes import RECIPES

FIRST = ("clip", "flip50", "att2x50", "aclip", "pgs-0.5", "aclip_fast")
"""Recipes of tier 1: the papers', and our fast one, which has to match aclip. lit needs a checkpoint of real pictures
and is no part of the study."""
SECOND = ("clip", *(name for name in RECIPES if name not in (*FIRST, "lit")))
"""Recipes of tier 2: the others, and clip to compare them with."""
ABLATIONS = {
    "pgs-0.5-no-edges": ("pgs-0.5", "pgs-no-edges"),
    "pgs-0.5-no-transport": ("pgs-0.5", "pgs-no-transport"),
    "att2x50-text": ("att2x50", "text"),
}
"""Name of a run -> recipe and the masker in its place."""
THIRD = (*dict.fromkeys(recipe for recipe, _ in ABLATIONS.values()), *ABLATIONS)
"""Runs of tier 3: single ideas switched off or exchanged, and the recipes that they belong to."""
TIERS = (FIRST, SECOND, THIRD)


@dataclass(frozen=True)
class Job:
    """One run of the queue."""

    recipe: str
    """Recipe, or row of ABLATIONS."""
    tier: int
    seed: int

    @property
    def name(self) -> str:
        """Folder of the run."""
        return f"tier{self.tier}-{self.recipe}-seed{self.seed}"
