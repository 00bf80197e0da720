"""The claims of A-CLIP (ICCV 2023) and CLIP-PGS (CVPR 2025), each with its rule; reported numbers are the tables'."""

from functools import partial

from eval.claims_found import models_gain, study_gain, time_ratio
from eval.claims_rows import Claim
from eval.claims_rules import FASTER, GAIN, TIME
from eval.reported_tables import load_table

ACLIP, PGS = "A-CLIP", "CLIP-PGS"
_ACLIP_SETTING = "ViT-B/16, YFCC15M, 25 epochs, ImageNet zero-shot; equal epochs, not equal time"
_PGS_SETTING = "ViT-B/16, CC12M, 32 epochs, mean of 17 sets; equal epochs, not equal time"
_GPU = "ViT-B/16 on GPUs, whole training"
_OBJECTS = "avg obj"
_SHIFTED = ("imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-o", "imagenet-sketch")


def claims() -> list[Claim]:
    """A-CLIP's, then CLIP-PGS's."""
    return [*_aclip_quality(), *_aclip_time(), *_pgs_quality(), *_pgs_time(), *_pgs_other()]


def _ahead(paper: str, claim: str, recipe: str, base: str, cells: tuple[float, float], where: str) -> Claim:
    """A recipe ahead of another one in the study. Args: cells: reported values of base and recipe, percent."""
    return Claim(
        paper=paper,
        claim=claim,
        reported=round(cells[1] - cells[0], 1),
        where=f"{where}, {cells[0]:g} -> {cells[1]:g}",
        unit="points ahead",
        measure=partial(study_gain, recipe=recipe, base=base),
        rule=GAIN,
        paper_setting=_ACLIP_SETTING if paper == ACLIP else _PGS_SETTING,
    )


def _aclip_quality() -> list[Claim]:
    masks, main = load_table("aclip_masks"), load_table("aclip_main")
    mask = {row.name: row.values["imagenet"] for row in masks.rows}
    whole = {row.name.removesuffix(", 25 epochs"): row.values["imagenet"] for row in main.rows}
    none, two = mask["no mask, 1 view"], mask["attentive 50 %, 2 views"]
    single = mask["random 50 %, 1 view"], mask["attentive 50 %, 1 view"]
    ahead = partial(_ahead, ACLIP)
    return [
        ahead("attentive masking beats random masking, 1 view", "att1x50", "rand1x50", single, "table 2a"),
        ahead("attentive masking, 2 views, beats no mask", "att2x50", "clip", (none, two), "table 2a"),
        ahead("no mask beats dropping the most attended half", "clip", "att2x50_high",
              (mask["attended half dropped, 2 views"], none), "table 2a"),
        ahead("its self-supervised terms add to attentive masking", "aclip", "att2x50", (two, whole["A-CLIP"]),
              "tables 1 and 2a"),
        ahead("A-CLIP beats CLIP", "aclip", "clip", (whole["CLIP"], whole["A-CLIP"]), "table 1"),
        ahead("A-CLIP-eff beats CLIP", "aclip_eff", "clip", (whole["CLIP"], whole["A-CLIP-eff"]), "table 1"),
    ]  # fmt: skip


def _time(paper: str, name: str, recipe: str, reported: float, where: str) -> Claim:
    return Claim(
        paper=paper,
        claim=f"{name} trains in this time of plain CLIP",
        reported=reported,
        where=where,
        unit="x time",
        measure=partial(time_ratio, recipe=recipe),
        rule=TIME,
        paper_setting=_GPU,
    )


def _aclip_time() -> list[Claim]:
    table = load_table("aclip_main")
    times = {row.name.removesuffix(", 25 epochs"): row.values["time"] for row in table.rows if "time" in row.values}
    faster = times["SLIP"] / times["A-CLIP"]
    return [
        _time(ACLIP, "A-CLIP", "aclip", times["A-CLIP"], "table 1"),
        _time(ACLIP, "A-CLIP-eff", "aclip_eff", times["A-CLIP-eff"], "table 1"),
        Claim(
            paper=ACLIP,
            claim="A-CLIP trains faster than SLIP",
            reported=round(faster, 2),
            where=f"table 1, {times['SLIP']:g} / {times['A-CLIP']:g} of plain CLIP",
            unit="x faster",
            measure=partial(time_ratio, recipe="slip", base="aclip"),
            rule=FASTER,
            paper_setting=_GPU,
        ),
    ]


def _pgs_quality() -> list[Claim]:
    average = {row.name: row.values["avg"] for row in load_table("pgs_zero_shot").rows}
    half, less = average["CLIP-PGS-0.5"], average["CLIP-PGS-0.3"]
    ahead = partial(_ahead, PGS)
    where = "zero-shot table"
    return [
        ahead("CLIP-PGS-0.5 beats CLIP", "pgs-0.5", "clip", (average["CLIP"], half), where),
        ahead("CLIP-PGS-0.3 beats CLIP", "pgs-0.3", "clip", (average["CLIP"], less), where),
        ahead("CLIP-PGS-0.5 beats random masking (FLIP)", "pgs-0.5", "flip50", (average["FLIP"], half), where),
        ahead("CLIP-PGS-0.3 beats cluster masking (E-CLIP)", "pgs-0.3", "eclip", (average["E-CLIP"], less), where),
        ahead("CLIP-PGS-0.5 beats A-CLIP", "pgs-0.5", "aclip", (average["A-CLIP"], half), where),
    ]


def _pgs_time() -> list[Claim]:
    times = {row.name: row.values["time"] for row in load_table("pgs_zero_shot").rows}
    return [
        _time(PGS, name, name.removeprefix("CLIP-").lower(), times[name], "zero-shot table")
        for name in ("CLIP-PGS-0.5", "CLIP-PGS-0.3")
    ]


def _pgs_other() -> list[Claim]:
    rows = {row.name: row.values for row in load_table("pgs_robustness").rows}
    shifted = {name: sum(rows[name][one] for one in _SHIFTED) / len(_SHIFTED) for name in ("CLIP", "CLIP-PGS-0.3")}
    parts = dict(load_table("pgs_composition").means)[_OBJECTS]
    table = load_table("pgs_composition")
    objects = {name: sum(table.row(name).values[one] for one in parts) / len(parts) for name in shifted}
    runs = "--model <folder of a tier1 or tier2 run of python -m eval pretrain-study>"
    shared = {"paper": PGS, "unit": "points ahead", "rule": GAIN}
    robust = f"python -m eval robustness {runs} --data imagenet --out docs/results/robustness, for clip and pgs-0.3"
    compose = (
        f"python -m eval composition {runs} --data sugarcrepe --out docs/results/composition, for clip and pgs-0.3"
    )
    return [
        Claim(
            claim="protecting edges helps",
            reported=None,
            where="claimed; no ablation found, and the published code prefers edges as candidates to mask",
            measure=partial(study_gain, recipe="pgs-0.5", base="pgs-0.5-no-edges", flags=" --tiers 3"),
            paper_setting=_PGS_SETTING,
            **shared,
        ),
        Claim(
            claim="CLIP-PGS-0.3 is more robust than CLIP (ImageNet V2, A, R, O, Sketch)",
            reported=round(shifted["CLIP-PGS-0.3"] - shifted["CLIP"], 1),
            where=f"robustness table, {shifted['CLIP']:.1f} (printed {rows['CLIP']['OOD avg']:g}) -> "
            f"{shifted['CLIP-PGS-0.3']:.1f}",
            measure=partial(
                models_gain, folder="robustness", recipe="pgs-0.3", base="clip", without=("imagenet", "digits"),
                command=robust,
            ),
            paper_setting=_PGS_SETTING,
            **shared,
        ),
        Claim(
            claim="CLIP-PGS-0.3 tells objects in captions better than CLIP (SugarCrepe)",
            reported=round(objects["CLIP-PGS-0.3"] - objects["CLIP"], 1),
            where=f"composition table, {objects['CLIP']:.1f} (printed {table.row('CLIP').values[_OBJECTS]:g}) -> "
            f"{objects['CLIP-PGS-0.3']:.1f}",
            measure=partial(
                models_gain, folder="composition", recipe="pgs-0.3", base="clip", without=(), command=compose
            ),
            paper_setting=_PGS_SETTING,
            **shared,
        ),
    ]  # fmt: skip
