"""Printed compute and training time beside what the described work costs.

1 MAC = 2 FLOP; the papers' "GFLOPs" are GMACs. What training costs comes from `patchrank.pretrain.cost`.
"""

from eval.pretrain_steps import vit_b_config
from eval.reported_tables import Finding, load_table
from export.bench_graphs import SHAPES
from patchrank.macs import dense_macs, pruned_macs
from patchrank.pretrain.cost import cost_table, text_macs
from patchrank.spec import PruneSpec
from patchrank.text import TextConfig

_B16 = SHAPES["ViT-B-16"]
_TEXT = TextConfig(context=77, width=512, num_layers=12, num_heads=8, mlp_width=2048, output_dim=512)
_ROUNDING = 0.05
"""Times are printed to 0.1 or 0.01, compute to 0.1: half of a step of 0.1."""


def compute_findings() -> list[Finding]:
    """All of them."""
    return [*_prompts(), *_savings(), *_pretraining(), *_masked_views()]


def image_gmacs(num_patches: int, num_more: int = 0) -> float:
    """GMACs of the ViT-B/16 image tower on some of its patches and `num_more` added tokens, last block in full."""
    tokens, blocks = 1 + num_patches + num_more, _B16.num_layers
    one = 2 * _B16.width * (2 * _B16.width + _B16.mlp_width) * tokens + 2 * tokens**2 * _B16.width
    return (3 * _B16.patch_size**2 * _B16.width * _B16.num_patches + blocks * one) / 1e9


def _prompts() -> list[Finding]:
    """Patch Ranking's tables 5 and figure 1: prompts and the points of the tuned rows."""
    table, points = load_table("patch_ranking_5"), load_table("compute_points")
    cost = {row.name: row.values["GFLOPs"] for row in table.rows}
    found = []
    for kind in ("text prompts", "text and visual prompts"):
        printed = cost[f"{kind}, pruned"]
        at = {keep: points.row(f"figure 1, {kind}, keep {keep}").values["GFLOPs"] for keep in (60, 50)}
        if printed == at[50] != at[60]:
            text = (
                f"{kind}: {printed:g} GFLOPs at keep 60 % is figure 1's point of keep 50; keep 60 is {at[60]:g} there"
            )
            found.append(Finding("compute", "patch_ranking_5", text))
    added = cost["text and visual prompts, dense"] - cost["text prompts, dense"]
    needed = image_gmacs(196, 16) - image_gmacs(196)
    if abs(added - needed) > 2 * _ROUNDING:
        text = f"16 visual tokens are charged {added:.1f} GFLOPs; in 12 blocks they cost {needed:.2f}"
        found.append(Finding("compute", "patch_ranking_5", text))
    text_only = cost["text prompts, dense"] - cost["dense"]
    if text_only > 2 * _ROUNDING:
        text = f"text prompts are charged {text_only:.1f} GFLOPs, though the text stays 77 tokens long"
        found.append(Finding("compute", "patch_ranking_5", text))
    saved = {
        kind or "untuned": round(cost[dense] - cost[pruned], 1)
        for kind, dense, pruned in (
            ("", "dense", "pruned"),
            *((kind, f"{kind}, dense", f"{kind}, pruned") for kind in ("text prompts", "text and visual prompts")),
        )
    }
    if max(saved.values()) - min(saved.values()) > 2 * _ROUNDING:
        said = ", ".join(f"{name} {value:g}" for name, value in saved.items())
        found.append(Finding("compute", "patch_ranking_5", f"the same cuts of the same tower save {said} GFLOPs"))
    return found


def _savings() -> list[Finding]:
    """Patch Ranking's "more than 30 %": what 4 x 20 tokens save."""
    stages = tuple((layer, left / _B16.num_patches) for layer, left in ((3, 176), (5, 156), (7, 136), (9, 116)))
    dense = dense_macs(_B16, class_row_only=False) / 1e9
    pruned = pruned_macs(_B16, PruneSpec(cuts=stages, rest="drop", select="topk"), class_row_only=False) / 1e9
    printed = {name: load_table("patch_ranking_3").row(name).values["GFLOPs"] for name in ("dense", "pruned, keep 60")}
    share, total = 1 - pruned / dense, (dense - pruned) / printed["dense"]
    claimed = 1 - printed["pruned, keep 60"] / printed["dense"]
    text = (
        f"4 x 20 tokens save {share:.1%} of the image tower, {total:.1%} of the printed total; printed is {claimed:.1%}"
    )
    return [Finding("compute", "patch_ranking_3", text)]


def _pretraining() -> list[Finding]:
    """A-CLIP's training times beside the multiply-accumulates of a step, both relative to CLIP."""
    costs = {row.recipe: row.macs_ratio for row in cost_table(vit_b_config("clip", 64, "cpu"))}
    names = {"slip": "SLIP", "aclip": "A-CLIP", "aclip_eff": "A-CLIP-eff"}
    table = load_table("aclip_main")
    found = []
    for recipe, name in names.items():
        time = table.row(f"{name}, 25 epochs").values["time"]
        if time < costs[recipe] - _ROUNDING:
            text = (
                f"{name}: printed time {time:g} of CLIP's, its multiply-accumulates are {costs[recipe]:.2f} of CLIP's"
            )
            found.append(Finding("compute", "aclip_main", text))
    return found


def _masked_views() -> list[Finding]:
    """CLIP-PGS's training times beside the multiply-accumulates of image and text towers."""
    text = text_macs(_TEXT) / 1e9
    found = []
    for name, num_patches in (("FLIP", 98), ("CLIP-PGS-0.5", 98), ("CLIP-PGS-0.3", 137)):
        time = load_table("pgs_zero_shot").row(name).values["time"]
        cost = (image_gmacs(num_patches) + text) / (image_gmacs(196) + text)
        if time < cost - _ROUNDING:
            said = f"{name}: printed time {time:g} of CLIP's, {num_patches} patches and the text cost {cost:.2f}"
            found.append(Finding("compute", "pgs_zero_shot", said))
    return found
