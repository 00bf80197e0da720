"""Other ways to spend fewer MACs on a frozen image tower, each written from its paper, behind one signature.

A new rival is one `build` function (in a file of its own where it is a method of its own) and one row in `RIVALS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from eval.rivals import covering, evit, low_resolution, tome
from eval.rivals.budget import Rival
from patchrank.errors import UserError
from patchrank.tower import VisionTower

__all__ = ["OURS", "RIVALS", "Rival", "Row", "build"]

OURS = "ours"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method: how it is built, and what it is in a few words."""

    build: Callable[[VisionTower, float], Rival]
    """(tower, macs share in (0, 1]) -> module whose MACs are as near to that as its settings allow."""
    text: str


RIVALS: dict[str, Row] = {
    OURS: Row(build=covering.ours, text="patchrank.apply(model, macs=...): the accurate preset"),
    "ours-low-latency": Row(build=covering.ours_low_latency, text="the low-latency preset: one cut"),
    "tome": Row(build=tome.build, text="ToMe, every block, as published"),
    "tome-2-5": Row(build=partial(tome.build, first=2, last=5), text="ToMe in blocks 2 to 5 of 0 to 11"),
    "tome-3-6": Row(build=partial(tome.build, first=3, last=6), text="ToMe in blocks 3 to 6"),
    "tome-2-10": Row(build=partial(tome.build, first=2, last=10), text="ToMe in blocks 2 to 10"),
    "farthest-fold": Row(build=covering.farthest_fold, text="one cut, farthest points, the rest folded"),
    "evit": Row(build=evit.build, text="EViT, one cut, class attention, one fused token"),
    "evit-staged": Row(build=partial(evit.build, staged=True), text="EViT, three cuts, as published"),
    "drop-class-attention": Row(
        build=partial(covering.drop, scorer="class-attention"),
        text="one cut, class attention, the rest dropped",
    ),
    "drop-token-norm": Row(
        build=partial(covering.drop, scorer="token-norm"), text="one cut, longest tokens, the rest dropped"
    ),
    "drop-centre": Row(build=partial(covering.drop, scorer="centre"), text="one cut, image centre, the rest dropped"),
    "drop-checkerboard": Row(
        build=partial(covering.drop, scorer="checkerboard"), text="one cut, checkerboard, the rest dropped"
    ),
    "drop-random": Row(build=partial(covering.drop, scorer="random"), text="one cut, random, the rest dropped"),
    "low-resolution": Row(build=low_resolution.build, text="smaller image, position embedding resized"),
}
"""Name -> method. All use the same tower, with a last block that computes the class row only."""


def build(name: str, tower: VisionTower, macs: float) -> Rival:
    """The method `name` on a frozen tower at the share `macs` of its dense MACs.

    Raises: UserError for an unknown name, a budget out of reach, or a tower without the class token that it needs.
    """
    if name not in RIVALS:
        raise UserError(f"rival {name!r}: unknown; choose one of {', '.join(RIVALS)}")
    return RIVALS[name].build(tower, macs)
