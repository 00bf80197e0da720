"""What does not add up in the printed tables: averages, compute, and numbers that cannot both be right.

1 MAC = 2 FLOP; the papers' "GFLOPs" are GMACs.
"""

from dataclasses import dataclass

from eval.reported_compute import compute_findings
from eval.reported_readings import readings
from eval.reported_tables import SEVEN, Finding, Row, Table, load_table, table_names
from export.bench_graphs import SHAPES
from patchrank.macs import dense_macs, pruned_macs
from patchrank.spec import PruneSpec

ROUNDING = 0.1
"""Largest distance that rounding alone explains: cells and averages are printed to 0.1, so 0.05 each."""
_B16 = SHAPES["ViT-B-16"]
_LAYER, _STAGES = 3, ((3, 176), (5, 156), (7, 136), (9, 116))


@dataclass(frozen=True)
class Slip:
    """A printed average beside the one that its printed cells give."""

    table: str
    row: str
    column: str
    printed: float
    recomputed: float

    @property
    def beyond_rounding(self) -> bool:
        """Whether rounding of cells and average cannot explain it."""
        return abs(self.printed - self.recomputed) > ROUNDING + 1e-9


def recomputed_mean(row: Row, columns: tuple[str, ...]) -> float:
    """Mean of some printed cells, which must all be there."""
    return sum(row.values[column] for column in columns) / len(columns)


def slips(table: Table) -> list[Slip]:
    """Averages of a table that its own cells do not give at the printed precision."""
    found = []
    for column, parts in table.means.items():
        digits = max(len(f"{row.values[column]:g}".partition(".")[2]) for row in table.rows)
        for row in table.rows:
            mean, printed = recomputed_mean(row, parts), row.values[column]
            if abs(mean - printed) > 0.5 * 10**-digits + 1e-9:
                found.append(Slip(table.name, row.name, column, printed, mean))
    return found


def compute_points() -> dict[str, float]:
    """GMACs that Patch Ranking's ViT-B/16 really costs with its text part: name -> image tower + text.

    The text part is what the printed dense 23.4 holds beside the image tower. The last block is counted in full, as
    the paper does. Source: Patch Ranking, tables 3 to 5 and figure 1.
    """
    dense = dense_macs(_B16, class_row_only=False) / 1e9
    text = load_table("patch_ranking_3").row("dense").values["GFLOPs"] - dense

    def cost(*cuts: tuple[int, float]) -> float:
        spec = PruneSpec(cuts=cuts, rest="drop", select="topk")
        return pruned_macs(_B16, spec, class_row_only=False) / 1e9 + text

    found = {f"one cut, keep {percent}": cost((_LAYER, percent / 100)) for percent in (90, 80, 70, 60, 50)}
    stages = tuple((layer, count / _B16.num_patches) for layer, count in _STAGES)
    return {"dense": dense + text} | found | {"4 x 20 tokens": cost(*stages)}


def _average_findings() -> list[Finding]:
    found = []
    for name in table_names():
        for slip in slips(load_table(name)):
            why = "" if slip.beyond_rounding else " (rounding of the cells may explain it)"
            text = f"{slip.row}, {slip.column}: printed {slip.printed:.1f}, its cells give {slip.recomputed:.2f}{why}"
            found.append(Finding("average", name, text))
    return found


def _compute_findings() -> list[Finding]:
    points = compute_points()
    printed = load_table("patch_ranking_3").row("pruned, keep 60").values["GFLOPs"]
    nearest = min(points, key=lambda name: abs(points[name] - printed))
    said = f"one cut to 60 % costs {points['one cut, keep 60']:.1f}, 4 x 20 tokens cost {points['4 x 20 tokens']:.1f}"
    dense, pruned = (load_table("patch_ranking_3").row(name).values for name in ("dense", "pruned, keep 60"))
    speed, compute = dense["ms"] / pruned["ms"], dense["GFLOPs"] / pruned["GFLOPs"]
    return [
        Finding("compute", "patch_ranking_3", f"{printed:g} GFLOPs at keep 60 % is the point of {nearest}; {said}"),
        Finding("compute", "patch_ranking_3", f"time falls {speed:.2f}x where compute falls {compute:.2f}x"),
    ]


def _same_numbers() -> list[Finding]:
    """The several-cut rows of tables 4 and 5 beside the one-cut rows of table 1, digit by digit."""
    one_cut = {
        row.labels["dataset"]: row.values["predicted 60"]
        for row in load_table("patch_ranking_1").rows
        if row.labels["score"] == "preservation"
    }
    found = []
    for name, row in (("patch_ranking_4", "Patch Ranking"), ("patch_ranking_5", "pruned")):
        values = load_table(name).row(row).values
        if all(values[column] == one_cut[column] for column in SEVEN):
            text = f"{row} (cuts at four layers) is digit by digit table 1's one cut at keep 60 % on all seven sets"
            found.append(Finding("same numbers", name, text))
    return found


def _two_values() -> list[Finding]:
    """One setting printed twice with different numbers, and a figure under another data set's name."""
    found = []
    first = load_table("patch_ranking_5").row("text and visual prompts, pruned").values
    second = load_table("patch_ranking_7").row("layers 4, 6, 8, 10").values
    gaps = [round(second[column] - first[column], 1) for column in SEVEN]
    if any(gaps):
        text = f"layers 4, 6, 8, 10 differs from table 5's same setting by {min(gaps):+g} to {max(gaps):+g}"
        found.append(Finding("two values", "patch_ranking_7", text))
    rows = {row.name: row.values for row in load_table("patch_ranking_1").rows}
    table_1 = [rows[f"{name} preservation"]["predicted 50"] for name in SEVEN]
    table_2 = [load_table("patch_ranking_2").row(name).values[name] for name in SEVEN]
    figure_5 = [load_table("patch_ranking_figure_5").row(f"{name} predicted").values["keep 50"] for name in SEVEN]
    if any(len(set(values)) > 1 for values in zip(table_1, table_2, figure_5)):
        means = " / ".join(f"{sum(values) / len(SEVEN):.1f}" for values in (table_1, table_2, figure_5))
        better = sum(first > fourth for first, fourth in zip(figure_5, table_1))
        text = (
            f"keep 50 %, predicted preservation: mean {means} in tables 1, 2 and figure 5; there pruning at the first "
            f"layer beats pruning at the fourth on {better} of 7 sets"
        )
        found.append(Finding("two values", "patch_ranking_2", text))
    unpruned = load_table("compute_points").row("figure 1, dense").values["top-1"]
    dense = load_table("patch_ranking_5").row("dense").values
    name = min(SEVEN, key=lambda column: abs(dense[column] - unpruned))
    if name != "caltech101":
        text = f"figure 1, captioned Caltech101 ({dense['caltech101']:g}), starts at {unpruned:g}: those of {name}"
        found.append(Finding("two values", "compute_points", text))
    suite, main = (
        load_table("aclip_suite").row("A-CLIP, 100 epochs"),
        load_table("aclip_main").row("A-CLIP, 100 epochs"),
    )
    printed = suite.values["imagenet"], main.values["imagenet"]
    if len(set(printed)) > 1:
        text = f"A-CLIP, 100 epochs, ImageNet: {printed[0]:g} here, {printed[1]:g} in the main table"
        found.append(Finding("two values", "aclip_suite", text))
    return found


def headline_losses() -> dict[str, float]:
    """Points that pruning costs in Patch Ranking's table 5, from its printed averages, by how it was tuned."""
    table = load_table("patch_ranking_5")
    pairs = {
        "untuned": ("dense", "pruned"),
        "text prompts": ("text prompts, dense", "text prompts, pruned"),
        "text and visual prompts": ("text and visual prompts, dense", "text and visual prompts, pruned"),
    }
    return {
        name: round(table.row(dense).values["avg"] - table.row(pruned).values["avg"], 1)
        for name, (dense, pruned) in pairs.items()
    }


def _headline() -> list[Finding]:
    losses = ", ".join(f"{name} {loss:g}" for name, loss in headline_losses().items())
    return [Finding("reading", "patch_ranking_5", f"points lost by pruning: {losses}; the headline is the last")]


def findings() -> list[Finding]:
    """Everything, computed from the tables."""
    compute = _compute_findings() + compute_findings()
    return _average_findings() + compute + _same_numbers() + _two_values() + _headline() + readings()
