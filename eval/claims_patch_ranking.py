"""Patch Ranking's claims (WACV 2025, arXiv 2409.14607), each with its rule; reported numbers come from the tables."""

from functools import partial

from eval.claims_files import Files
from eval.claims_found import accuracy_gain, accuracy_loss
from eval.claims_rows import Claim
from eval.claims_rules import ADDS_UP, AS_MUCH, AT_MOST, FASTER, GAIN, OPTIMAL, Found
from eval.claims_search import (
    curve_gain,
    golden_gain,
    golden_loss,
    golden_match,
    headroom,
    prompt_gain,
    prompt_loss,
    speed_up,
)
from eval.reported_checks import compute_points, headline_losses
from eval.reported_tables import load_table

PAPER = "Patch Ranking"
_SETTING = "CLIP ViT-B/16, mean of 7 sets"
_TRAINED = "ours-trained-drop"
"""The papers' way: a trained scorer, the tower frozen, the rest dropped."""
_MACS = 0.7
"""What one cut of 40 % of the patches before block 3 leaves."""
_CUTS = "; the cuts are spread over 8 blocks at the cost of one that takes 40 %"
_HOME = "tiny-imagenet"
"""Where our predictor was trained."""
CHANCE = 100 / 196
"""Overlap of two random sets of 100 of 196 patches."""


def _means(score: str) -> dict[str, float]:
    """Means of table 1 over the seven sets for one score."""
    rows = [row.values for row in load_table("patch_ranking_1").rows if row.labels["score"] == score]
    return {column: sum(values[column] for values in rows) / len(rows) for column in rows[0]}


def corrected(match: float) -> float:
    """A match rate in percent, 0 for chance and 1 for equal sets."""
    return (match / 100 - CHANCE) / (1 - CHANCE)


def _cells_above_golden() -> tuple[int, int]:
    """Cells of table 1 in which the predicted preservation ranking beats the golden one, and all such cells."""
    rows = [row.values for row in load_table("patch_ranking_1").rows if row.labels["score"] == "preservation"]
    pairs = [(values[f"predicted {keep}"], values[f"golden {keep}"]) for values in rows for keep in (80, 70, 60, 50)]
    return sum(predicted > golden for predicted, golden in pairs), len(pairs)


def _figure_mean(method: str) -> float:
    """Mean over the seven sets of figure 5 at keep 60 %."""
    rows = [row for row in load_table("patch_ranking_figure_5").rows if row.labels["method"] == method]
    return sum(row.values["keep 60"] for row in rows) / len(rows)


def _transfer_means() -> tuple[float, float]:
    """Means of table 2 where training and test set are the same, and where they differ."""
    own, other = [], []
    for row in load_table("patch_ranking_2").rows:
        for train, value in row.values.items():
            (own if train == row.name else other).append(value)
    return sum(own) / len(own), sum(other) / len(other)


def _compute(_: Files) -> Found:
    points = compute_points()
    return Found(
        value=points["4 x 20 tokens"],
        setting=f"exact count; the printed figure is the point of one cut to 50 %, {points['one cut, keep 50']:.1f}",
        command="python -m eval reported",
    )


def claims() -> list[Claim]:
    """All of them, in the order of the paper."""
    make = partial(Claim, paper=PAPER, paper_setting=_SETTING)
    return [*_losses(make), *_golden(make), *_predictor(make), *_cost(make)]


def _losses(make) -> list[Claim]:
    losses, table = headline_losses(), load_table("patch_ranking_5")
    tuned, untuned = (losses[name] for name in ("text and visual prompts", "untuned"))

    def averages(name: str) -> str:
        return " -> ".join(f"{table.row(one).values['avg']:g}" for one in (f"{name}dense", f"{name}pruned"))

    plain = {"reported": untuned, "where": f"table 5, {averages('')}", "unit": "points lost", "rule": AT_MOST}
    prompted = plain | {"reported": tuned, "where": f"table 5, {averages('text and visual prompts, ')}"}
    lost = partial(partial, accuracy_loss, macs=_MACS, how=_CUTS)
    little = "40 % of the patches cost this little"
    return [
        make(claim=f"{little}, prompts tuned", measure=prompt_loss, **prompted),
        make(claim=f"{little}, untuned, the rest dropped", measure=lost(method=_TRAINED), **plain),
        make(claim="the same saving costs this little, untrained, the rest folded (ours)",
             measure=lost(method="ours"), **plain),
        make(claim="the same saving costs this little, LayerNorms re-fitted, the rest folded (ours)",
             measure=lost(method="ours-calibrated"), **prompted),
        make(claim="visual (compensation) tokens take loss away beside text prompts",
             reported=round(losses["text prompts"] - tuned, 1), where=f"table 5, {losses['text prompts']} -> {tuned}",
             unit="points ahead", measure=prompt_gain, rule=GAIN),
        make(claim="compensation tokens at the cut help a trained scorer", reported=None,
             where="section 3.3 has them at the input, tied to prompts", unit="points ahead",
             measure=partial(accuracy_gain, first="ours-tokens", second="ours-trained", macs=_MACS), rule=GAIN),
    ]  # fmt: skip


def _golden(make) -> list[Claim]:
    label, kept = _means("label"), _means("preservation")
    above, cells = _cells_above_golden()
    free = ("random", "centre")
    return [
        make(claim="golden keep sets by label (an oracle) beat the unpruned model, keep 60 %",
             reported=round(label["golden 60"] - label["dense"], 1), unit="points ahead",
             where=f"table 1, {label['dense']:.1f} -> {label['golden 60']:.1f}",
             measure=partial(golden_gain, criterion="label", keep="0.6"), rule=GAIN),
        make(claim="golden keep sets by feature preservation lose this little, keep 60 %",
             reported=round(kept["dense"] - kept["golden 60"], 1), unit="points lost",
             where=f"table 1, {kept['dense']:.1f} -> {kept['golden 60']:.1f}",
             measure=partial(golden_loss, criterion="preservation", keep="0.6"), rule=AT_MOST),
        make(claim="greedy search beats random and image centre", reported=None,
             where="abstract; neither baseline is printed", unit="cosine ahead",
             measure=partial(curve_gain, strategy="greedy-1", others=free), rule=GAIN),
        make(claim="one sweep, as the text describes it, beats random and image centre", reported=None,
             where="section 3.1; neither baseline is printed", unit="cosine ahead",
             measure=partial(curve_gain, strategy="sweep", others=free), rule=GAIN),
        make(claim="one sweep finds the optimal (golden) order", reported=None,
             where=f"section 3.1; its own prediction beats it in {above} of {cells} cells of table 1",
             unit="of the headroom", measure=partial(headroom, strategy="sweep"), rule=OPTIMAL),
    ]  # fmt: skip


def _predictor(make) -> list[Claim]:
    label, kept = _means("label"), _means("preservation")
    own, other = _transfer_means()
    attention, predicted = (_figure_mean(method) for method in ("class attention", "predicted"))
    found = [
        make(claim="a predictor trained on golden rankings finds their top 100 (corrected for chance)",
             reported=round(corrected(kept["match@100"]), 2), unit="of the match beyond chance",
             where=f"table 1, {kept['match@100']:.1f} % where chance is {100 * CHANCE:.1f} %; label "
             f"{label['match@100']:.1f} %",
             measure=partial(golden_match, column="match", from_rankings=True), rule=AS_MUCH),
        make(claim="a trained scorer finds more of the golden top 100 than positions alone do", reported=None,
             unit="of the match beyond chance", where="section 3.2 and table 2; no such baseline is printed",
             measure=partial(golden_match, column="minus_mean_rank", from_rankings=False), rule=GAIN),
        make(claim="the predicted ranking beats class attention", reported=round(predicted - attention, 1),
             where=f"figure 5, keep 60 %, {attention:.1f} -> {predicted:.1f}", unit="points ahead",
             measure=partial(accuracy_gain, first=_TRAINED, second="drop-class-attention", macs=_MACS,
                             how=", class attention in one cut"), rule=GAIN),
        make(claim="the predictor works on data that it was not trained on", reported=None, unit="points ahead",
             where=f"table 2, {other:.1f} on other sets, {own:.1f} on its own",
             measure=partial(accuracy_gain, first=_TRAINED, second="drop-class-attention", macs=_MACS, without=(_HOME,),
                             how=", against class attention in one cut, trained on Tiny-ImageNet"),
             rule=GAIN),
    ]  # fmt: skip
    table = load_table("patch_ranking_4")
    rivals = (
        ("EViT", "evit-staged", ", EViT in three cuts"),
        ("A-ViT", "a-vit", ", A-ViT untrained, with fixed counts"),
        ("ToMe", "tome", ", ToMe in every block"),
    )
    for name, rival, how in rivals:
        mine, theirs = (table.row(row).values["avg"] for row in (PAPER, name))
        claim = make(
            claim=f"ahead of {name} at equal compute",
            reported=round(mine - theirs, 1),
            where=f"table 4, {theirs:g} -> {mine:g}",
            unit="points ahead",
            measure=partial(accuracy_gain, first=_TRAINED, second=rival, macs=_MACS, how=f", the rest dropped{how}"),
            rule=GAIN,
            paper_setting="CLIP ViT-B/16, mean of 8 sets",
        )
        found.append(claim)
    return found


def _cost(make) -> list[Claim]:
    dense, pruned = (load_table("patch_ranking_3").row(name).values for name in ("dense", "pruned, keep 60"))
    speed, compute = round(dense["ms"] / pruned["ms"], 2), dense["GFLOPs"] / pruned["GFLOPs"]
    where = (
        f"table 3, {dense['ms']:g} -> {pruned['ms']:g} ms an image (batch not said) where compute falls {compute:.2f}x"
    )
    shared = {"unit": "x faster", "reported": speed, "where": where, "paper_setting": "CLIP ViT-B/16, A4500 GPU"}
    many, one = (partial(speed_up, batch=batch) for batch in (16, 1))
    return [
        make(claim="4 x 20 tokens (40 %) cost what is printed", reported=pruned["GFLOPs"], unit="GMAC",
             where="tables 3 to 5", measure=_compute, rule=ADDS_UP),
        make(claim="without 40 % of the patches the encoder is faster, batch 16", measure=many, rule=FASTER, **shared),
        make(claim="without 40 % of the patches the encoder is faster, batch 1", measure=one, rule=FASTER, **shared),
        make(claim="it is faster by as much as is printed, batch 16", measure=many, rule=AS_MUCH, **shared),
    ]  # fmt: skip
