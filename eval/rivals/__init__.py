"""Other ways to spend fewer MACs on a frozen image tower, each written from its paper, behind one signature.

A new rival is one `build` function (in a file of its own where it is a method of its own) and one row in `RIVALS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eval.rivals import (
    avit,
    calibrated,
    covering,
    diffrate,
    dtem,
    evit,
    golden,
    low_resolution,
    pitome,
    shallow,
    tofu,
    tome,
    trained,
    visionzip,
)
from eval.rivals.budget import NotGiven, Rival, at_budget
from patchrank.errors import UserError
from patchrank.scorers import SCORERS
from patchrank.spec import RESTS
from patchrank.tower import VisionTower

__all__ = ["FILES", "OURS", "RIVALS", "TRAINING_FREE", "NotGiven", "Rival", "Row", "build"]

OURS = "ours"

_TRAIN = "python -m eval.rivals.train --method"
FILES: dict[str, str] = {
    "mean-rank": "a ranking store of train images: python -m patchrank.search --split train",
    "dtem": f"a trained embedding: {_TRAIN} dtem",
    "diffrate": f"searched rates: {_TRAIN} diffrate",
    "shallow": f"a distilled student of this depth: {_TRAIN} shallow",
    "trained": "a trained scorer: python -m predictors.train",
    "trained-drop": "a scorer trained with drop: python -m predictors.train --rest drop",
    "tokens": "a scorer trained with compensation tokens: python -m predictors.train --added summary",
    "calibrated": "a calibrated tower: python -m predictors.calibrate",
    "calibrated-rivals": f"a calibration of this row at this budget: {_TRAIN} calibrate --rival",
    "lora-rivals": f"the same with low-rank corrections: {_TRAIN} calibrate --lora-rank 4 --rival",
}
"""What some rows need, and how it is made; a folder may have a part for each budget (`0.7/`)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method: how it is built, and what it is in a few words."""

    build: Callable[..., Rival]
    """(tower, macs share in (0, 1]) -> module whose MACs are as near to that as its settings allow; with `needs`,
    (tower, macs, a path for each)."""
    text: str
    family: str = "rival"
    """"ours", "rival" or "oracle"; an oracle searches every image, so give it few."""
    needs: tuple[str, ...] = ()
    """The rows of `FILES` without which there is nothing to build."""
    exact: bool = True
    """Whether its settings are fine enough to meet a budget within 1 % (on 196 patches); if not, reports mark it."""


def _cuts(rest: str) -> dict[str, Row]:
    """One cut by every scorer that needs no training, by the mean golden rank and by farthest points."""
    words = {"centre": "image centre", "token-norm": "longest tokens", "class-attention": "class attention"}
    end = "the rest dropped" if rest == "drop" else "the rest folded"
    rows = {
        f"{rest}-{name}": Row(
            build=partial(covering.cut_by, scorer=name, rest=rest), text=f"one cut, {words.get(name, name)}, {end}"
        )
        for name in SCORERS
    }
    rows[f"{rest}-mean-rank"] = Row(
        build=partial(covering.mean_rank_cut, rest=rest),
        text=f"one cut, mean golden rank of the position, {end}",
        needs=("mean-rank",),
    )
    rows[f"{rest}-farthest"] = Row(build=partial(covering.farthest, rest=rest), text=f"one cut, farthest points, {end}")
    return rows


def _ours(build: Callable[..., Rival], text: str, *needs: str) -> Row:
    return Row(build=build, text=text, family="ours", needs=needs)


RIVALS: dict[str, Row] = {
    OURS: _ours(covering.ours, "patchrank.apply(model, macs=...): the accurate preset"),
    "ours-random": _ours(covering.ours_random, "the accurate preset with random priorities"),
    "ours-drop": _ours(partial(covering.ours, rest="drop"), "the accurate preset, the rest dropped"),
    "ours-low-latency": _ours(covering.ours_low_latency, "the low-latency preset: one cut"),
    "ours-trained": _ours(trained.build, "trained scorer and fold", "trained"),
    "ours-trained-drop": _ours(trained.build, "trained scorer, the rest dropped", "trained-drop"),
    "ours-tokens": _ours(trained.build, "trained scorer, fold and compensation tokens", "tokens"),
    "ours-calibrated": _ours(trained.build, "trained scorer and fold, calibrated", "calibrated"),
    "tome": Row(build=tome.build, text="ToMe, every block, as published"),
    "tome-one-shot": Row(build=tome.one_shot, text="ToMe, all merges in one block"),
    "tome-2-5": Row(build=partial(tome.build, first=2, last=5), text="ToMe in blocks 2 to 5 of 0 to 11"),
    "tome-3-6": Row(build=partial(tome.build, first=3, last=6), text="ToMe in blocks 3 to 6"),
    "tome-2-10": Row(build=partial(tome.build, first=2, last=10), text="ToMe in blocks 2 to 10"),
    "dtem": Row(build=dtem.build, text="DTEM, every block, learned embedding", needs=("dtem",)),
    "dtem-2-5": Row(build=partial(dtem.build, first=2, last=5), text="DTEM in blocks 2 to 5", needs=("dtem",)),
    "dtem-2-10": Row(build=partial(dtem.build, first=2, last=10), text="DTEM in blocks 2 to 10", needs=("dtem",)),
    "tofu": Row(build=tofu.build, text="ToFu, pruning below, MLERP merging above"),
    "mlerp": Row(build=tofu.build_mlerp, text="ToMe with norm-preserving merging (MLERP)"),
    "mlerp-2-10": Row(build=partial(tofu.build_mlerp, first=2, last=10), text="MLERP merging in blocks 2 to 10"),
    "pitome": Row(build=pitome.build, text="PiToMe, merging by energy, every block"),
    "pitome-2-10": Row(build=partial(pitome.build, first=2, last=10), text="PiToMe in blocks 2 to 10"),
    "diffrate": Row(build=diffrate.build, text="DiffRate-style, searched rates per block", needs=("diffrate",)),
    "diffrate-equal": Row(build=diffrate.build_equal, text="DiffRate-style, prune and merge, equal rates"),
    "visionzip": Row(build=visionzip.build, text="VisionZip-style, one block, dominant and contextual patches"),
    "a-vit": Row(build=avit.build, text="A-ViT-style halting, untrained, fixed counts"),
    "evit": Row(build=evit.build, text="EViT, one cut, class attention, one fused token"),
    "evit-staged": Row(build=partial(evit.build, staged=True), text="EViT, three cuts, as published"),
    **_cuts("drop"),
    **_cuts("fold"),
    "low-resolution": Row(build=low_resolution.build, text="smaller image, position embedding resized", exact=False),
    "shallow": Row(build=shallow.build, text="fewer blocks, distilled", needs=("shallow",), exact=False),
    "golden-drop": Row(
        build=partial(golden.build, rest="drop"), text="each image's own searched ranking, dropped", family="oracle"
    ),
    "golden-fold": Row(
        build=partial(golden.build, rest="fold"), text="each image's own searched ranking, folded", family="oracle"
    ),
}
"""Name -> method. All use the same tower, with a last block that computes the class row only."""

CALIBRATED = (
    "tome",
    "tome-one-shot",
    "tome-2-5",
    "tome-3-6",
    "tome-2-10",
    "mlerp",
    "mlerp-2-10",
    "tofu",
    "pitome-2-10",
)
CALIBRATED += ("dtem", "dtem-2-5", "dtem-2-10", "evit", "evit-staged")
CALIBRATED += tuple(
    f"{rest}-{name}"
    for rest in RESTS
    for name in ("random", "checkerboard", "centre", "class-attention", "mean-rank", "farthest")
)
"""Rows that are also shown with our calibration; a smaller image has no blocks that see fewer tokens than before."""

_KINDS = {
    "calibrated": (False, "calibrated", "calibrated-rivals"),
    "lora": (True, "calibrated with low-rank corrections", "lora-rivals"),
}
"""Suffix of the row -> with corrections or not, in words, the files it needs."""

RIVALS |= {
    f"{name}-{suffix}": Row(
        build=partial(calibrated.build, name=name, plain=RIVALS[name].build, corrected=corrected),
        text=f"{RIVALS[name].text}, {words}",
        needs=(*RIVALS[name].needs, files),
    )
    for suffix, (corrected, words, files) in _KINDS.items()
    for name in CALIBRATED
}

TRAINING_FREE: tuple[str, ...] = tuple(name for name, row in RIVALS.items() if not row.needs and row.family != "oracle")
"""Rows that need neither files nor a search per image."""


def build(name: str, tower: VisionTower, macs: float, files: Mapping[str, str | Path] | None = None) -> Rival:
    """The method `name` on a frozen tower at the share `macs` of its dense MACs.

    Args: files: paths by name of `FILES`, for the rows that need one.
    Raises: NotGiven where a row's file is not among them; UserError for an unknown name, a file that does not fit, a
    budget out of reach, or a tower without the class token that it needs.
    """
    if name not in RIVALS:
        raise UserError(f"rival {name!r}: unknown; choose one of {', '.join(RIVALS)}")
    row, files = RIVALS[name], files or {}
    for needed in row.needs:
        if needed not in files:
            raise NotGiven(f"{name}: skipped, needs {FILES[needed]}; none was given")
    return row.build(tower, macs, *(at_budget(Path(files[needed]), macs) for needed in row.needs))
