"""Recipes of pretraining, one row each: what the towers see of a picture, what they are asked, who teaches them.

`python -m patchrank.pretrain --recipe <row>`; a new recipe is a new row here. `--setting paper` takes the row's paper
hyper-parameters (`patchrank.pretrain.settings`), `--setting small` those for two cores. Times are relative to plain
CLIP as the papers report them, on their machines and not with this code.
"""

from dataclasses import dataclass, field, replace

from patchrank.pretrain.maskers import MaskSpec
from patchrank.pretrain.settings import (
    ACLIP,
    ECLIP,
    FLIP50,
    FLIP75,
    LIT,
    LIT_SMALL,
    MASKCLIP,
    PGS,
    SLIP,
    SMALL,
    YFCC,
    Setting,
)

FULL = MaskSpec()
"""Every patch stays."""
_RANDOM50, _RANDOM75 = MaskSpec(masker="random", keep=0.5), MaskSpec(masker="random", keep=0.25)
_ATTENTIVE = MaskSpec(masker="attentive", keep=0.5, block=2)
"""A-CLIP: 25 of 49 blocks of 2 x 2 patches."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One online view of a picture."""

    mask: MaskSpec = FULL
    colour: str = "none"
    """Row of `patchrank.pretrain.colour.COLOURS`: what is done to its colours."""
    area: tuple[float, float] | None = None
    """Share of the picture that a crop covers, least and most; None: the setting's."""
    meets_text: bool = True
    """Whether the contrastive terms use it."""
    meets_views: bool = True
    """Whether the terms between views and with the teacher use it."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The EMA teacher: momentum from `base` to 1 along half a cosine over the optimiser's steps."""

    base: float = 0.996
    shrink: int = 1
    """Its picture has 1 / shrink of the side: 2 is half resolution."""
    sees_view: bool = False
    """Whether it sees the first view itself, instead of a box of its own around all views."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One row of RECIPES."""

    views: tuple[View, ...] = (View(),)
    terms: dict[str, float] = field(default_factory=lambda: {"clip": 1.0})
    """Row of `patchrank.pretrain.objectives.OBJECTIVES` -> weight."""
    options: dict[str, dict] = field(default_factory=dict)
    """Objective -> what it is told beside its weight."""
    teacher: Teacher | None = None
    tuning: float = 0.0
    """Share of the steps, the last ones, that mask nothing; `--tuning` overrides it."""
    gather_grad: bool = True
    """Whether gradients flow through the gather of a run on several processes."""
    locked: bool = False
    """Whether the image tower is a checkpoint's (`--model`) and stays as it is."""
    paper: Setting
    small: Setting = SMALL
    reported_time: float | None = None
    """Training time relative to plain CLIP as reported; None: not found."""
    source: str

    def views_at(self, step: int, num_steps: int, start: float, start_keep: float, tuning: float | None = None):
        """The views of a step: first the cheap start, then the recipe's, then the same without masks.

        Args: `start` share of the steps [0, 1) in which every view shows only the `start_keep` patches of most
        contrast; 0 <= step < num_steps; `tuning` None: the recipe's.
        """
        if step < round(start * num_steps):
            return tuple(replace(view, mask=MaskSpec(masker="contrast", keep=start_keep)) for view in self.views)
        unmasked = round((self.tuning if tuning is None else tuning) * num_steps)
        if step >= num_steps - unmasked:
            return tuple(replace(view, mask=FULL) for view in self.views)
        return self.views


def _two(mask: MaskSpec, colour: str = "aclip") -> tuple[View, View]:
    return View(mask=mask, colour=colour), View(mask=mask, colour=colour)


_SLIP_VIEW = View(colour="slip", area=(0.08, 1.0), meets_text=False)
_ACLIP_TERMS = {"clip": 1.0, "simclr": 1.0, "byol": 2.0}
_ARM = "A-CLIP: Yang et al. 2023, its ablation of mask strategies; colours as in A-CLIP"
_DISTILL = {"distill": 0.05}

RECIPES: dict[str, Recipe] = {
    "clip": Recipe(paper=YFCC, reported_time=1.0, source="CLIP: Radford et al. 2021, in the frame of SLIP and A-CLIP"),
    "flip50": Recipe(
        views=(View(mask=_RANDOM50),),
        tuning=0.1,
        paper=FLIP50,
        reported_time=0.5,
        source="FLIP: Li et al. 2023, section 3; time 0.50 both there (table 1a) and in CLIP-PGS's re-run",
    ),
    "flip75": Recipe(
        views=(View(mask=_RANDOM75),),
        tuning=0.1,
        paper=FLIP75,
        reported_time=0.33,
        source="FLIP: Li et al. 2023, section 3, table 1a",
    ),
    "flip50_fold": Recipe(
        views=(View(mask=replace(_RANDOM50, rest="fold")),),
        tuning=0.1,
        paper=FLIP50,
        source="ours: FLIP with every other patch folded into its nearest kept one instead of dropped",
    ),
    "slip": Recipe(
        views=(View(meets_views=False), _SLIP_VIEW, _SLIP_VIEW),
        terms={"clip": 1.0, "simclr": 1.0},
        gather_grad=False,
        paper=SLIP,
        reported_time=2.67,
        source="SLIP: Mu et al. 2022; its CLIP loss gathers without gradient (issue 31 of its repository)",
    ),
    "maskclip": Recipe(
        terms={"clip": 1.0} | _DISTILL,
        teacher=Teacher(sees_view=True),
        paper=MASKCLIP,
        reported_time=1.56,
        source="MaskCLIP: Dong et al. 2023, sections 3.1 and 3.2; time of A-CLIP's row CLIP+MAE",
    ),
    "maskclip_mlm": Recipe(
        terms={"clip": 1.0, "mlm": 0.05} | _DISTILL,
        teacher=Teacher(sees_view=True),
        paper=MASKCLIP,
        source="MaskCLIP: Dong et al. 2023, with its masked language model",
    ),
    "rand1x50": Recipe(views=(View(mask=_RANDOM50, colour="aclip"),), paper=ACLIP, source=_ARM),
    "rand2x50": Recipe(views=_two(_RANDOM50), paper=ACLIP, source=_ARM),
    "att1x50": Recipe(views=(View(mask=_ATTENTIVE, colour="aclip"),), teacher=Teacher(), paper=ACLIP, source=_ARM),
    "att2x50": Recipe(views=_two(_ATTENTIVE), teacher=Teacher(), paper=ACLIP, source=_ARM),
    "att2x50_high": Recipe(
        views=_two(replace(_ATTENTIVE, masker="attentive-high")),
        teacher=Teacher(),
        paper=ACLIP,
        source=_ARM + ": drops the patches that are attended most",
    ),
    "aclip": Recipe(
        views=_two(_ATTENTIVE),
        terms=_ACLIP_TERMS,
        teacher=Teacher(),
        paper=ACLIP,
        reported_time=1.16,
        source="A-CLIP: Yang et al. 2023, table 1",
    ),
    "aclip_eff": Recipe(
        views=_two(_ATTENTIVE),
        terms=_ACLIP_TERMS,
        teacher=Teacher(shrink=2),
        paper=ACLIP,
        reported_time=0.86,
        source="A-CLIP-eff: Yang et al. 2023, table 1; the teacher sees half the resolution",
    ),
    "aclip_fast": Recipe(
        views=_two(replace(_ATTENTIVE, keep=20 / 49)),
        terms=_ACLIP_TERMS,
        teacher=Teacher(shrink=2),
        paper=ACLIP,
        source="ours: A-CLIP-eff with 20 of 49 blocks a view",
    ),
    "eclip": Recipe(
        views=(View(mask=MaskSpec(masker="cluster", keep=137 / 196, least=1 / 196, mean_keep=0.5)),),
        paper=ECLIP,
        reported_time=0.6,
        source="E-CLIP: Wei et al. 2024 (cluster masking): half of the patches on average by a searched threshold, at "
        "most 137 of 196; time of CLIP-PGS's re-run",
    ),
    "pgs-0.3": Recipe(
        views=(View(mask=MaskSpec(masker="pgs", keep=137 / 196)),),
        paper=PGS,
        reported_time=0.6,
        source="CLIP-PGS: Pei et al. 2025, 137 of 196 patches",
    ),
    "pgs-0.5": Recipe(
        views=(View(mask=MaskSpec(masker="pgs", keep=0.5)),),
        paper=PGS,
        reported_time=0.5,
        source="CLIP-PGS: Pei et al. 2025, 98 of 196 patches",
    ),
    "lit": Recipe(locked=True, paper=LIT, small=LIT_SMALL, source="LiT: Zhai et al. 2022, a locked image tower"),
}
"""clip on digits, all defaults (`python -m patchrank.pretrain --recipe clip --data digits`) made the embedded model:
5,000 steps of 64, seed 0, 53 processor minutes on two shared cores (33 by the clock), zero-shot 90.0 % on val (1,000
canvases) and 91.7 % on test (2,000). Its curriculum and cheap start come before the row's own view (`settings.py`)."""
