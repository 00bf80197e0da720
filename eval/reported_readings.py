"""What the printed numbers say beside what is claimed of them, where no single number is wrong.

Source: the tables in `eval/reported`; every sentence is computed from them.
"""

from eval.reported_tables import SEVEN, Finding, load_table

_KEEPS = (80, 70, 60, 50)
_RETRIEVAL = ("flickr30k i2t", "flickr30k t2i", "coco i2t", "coco t2i")


def readings() -> list[Finding]:
    """All of them."""
    return [*_rankings(), *_predictors(), *_comparison(), *_a_clip()]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _rankings() -> list[Finding]:
    """Patch Ranking's tables 1 and 2: how much of a golden ranking is learned, and what golden means."""
    rows = load_table("patch_ranking_1").rows
    scores = ("label", "confidence", "preservation")
    matches = {
        score: _mean([row.values["match@100"] for row in rows if row.labels["score"] == score]) for score in scores
    }
    said = ", ".join(f"{score} {value:.1f}" for score, value in matches.items())
    pairs = [
        (row.values[f"predicted {keep}"], row.values[f"golden {keep}"])
        for row in rows
        if row.labels["score"] == "preservation"
        for keep in _KEEPS
    ]
    above = sum(predicted > golden for predicted, golden in pairs)
    home = [
        (row.name == name, value) for row in load_table("patch_ranking_2").rows for name, value in row.values.items()
    ]
    inside, outside = (_mean([value for own, value in home if own == wanted]) for wanted in (True, False))
    return [
        Finding("reading", "patch_ranking_1", f"match@100 {said} %; chance is {100 * 100 / 196:.1f} %"),
        Finding(
            "reading",
            "patch_ranking_1",
            f"predicted preservation beats the golden ranking that it learned from in {above} of {len(pairs)} cells",
        ),
        Finding(
            "reading",
            "patch_ranking_2",
            f"trained on the tested set {inside:.2f}, on another {outside:.2f}: the predictor learns little of its set",
        ),
    ]


def _predictors() -> list[Finding]:
    """Patch Ranking's table 6: which predictor is best, with and without one data set."""
    rows = load_table("patch_ranking_6").rows
    cell = {(row.labels["dataset"], row.labels["predictor"]): row.values for row in rows}
    kinds = list(dict.fromkeys(row.labels["predictor"] for row in rows))
    lost = [
        f"{data} ({cell[data, best]['match@100']:g} of {best} against {cell[data, 'Mix-MLP']['match@100']:g})"
        for data in SEVEN
        if (best := max(kinds, key=lambda kind: cell[data, kind]["match@100"])) != "Mix-MLP"
    ]

    def means(sets: tuple[str, ...]) -> str:
        return ", ".join(f"{kind} {_mean([cell[data, kind]['keep 60'] for data in sets]):.1f}" for kind in kinds)

    without = tuple(data for data in SEVEN if data != "ucf101")
    text = f"at keep 60 %: {means(SEVEN)}; without ucf101: {means(without)}"
    found = [Finding("reading", "patch_ranking_6", text)]
    if lost:
        text = f"Mix-MLP has not the best match rate on {', '.join(lost)}"
        found.append(Finding("reading", "patch_ranking_6", text))
    return found


def _comparison() -> list[Finding]:
    """Patch Ranking's tables 4 and 5: who is best where, and which averages may not be held side by side."""
    ours, rivals = load_table("patch_ranking_4").row("Patch Ranking"), load_table("patch_ranking_4").rows[:3]
    lost = [
        f"{column} ({row.name} {row.values[column]:g} against {ours.values[column]:g})"
        for column in SEVEN
        for row in rivals
        if row.values[column] > ours.values[column]
    ]
    table = load_table("patch_ranking_5")
    worse = [
        f"{column} {table.row('text and visual prompts, dense').values[column]:g} after {value:g}"
        for column in SEVEN
        if table.row("text and visual prompts, dense").values[column] < (value := table.row("dense").values[column])
    ]
    eight, seven = ours.values["avg"], table.row("pruned").values["avg"]
    same = f"avg counts ImageNet, that of table 5 does not: {eight:g} and {seven:g} are the same row"
    found = [Finding("reading", "patch_ranking_4", same)]
    if lost:
        text = f"a rival is better on {', '.join(lost)}, where the own row is bold too"
        found.append(Finding("reading", "patch_ranking_4", text))
    if worse:
        text = f"tuning the unpruned model makes it worse on {', '.join(worse)}"
        found.append(Finding("reading", "patch_ranking_5", text))
    return found


def _a_clip() -> list[Finding]:
    """A-CLIP's tables beside those of the methods that it is compared with."""
    table = load_table("aclip_main")
    values = {name: table.row(f"{name}, 25 epochs").values for name in ("SLIP", "A-CLIP", "A-CLIP-eff")}
    own, whole = values["A-CLIP"], load_table("maskclip").row("MaskCLIP").values
    shown = table.row("MaskCLIP (CLIP+MAE), 25 epochs").values
    ahead = [column for column in ("imagenet", *_RETRIEVAL) if whole[column] > own[column]]
    slip = load_table("slip")
    copied = [
        row.name
        for row in table.rows
        if any(row.name == one.name and row.values["imagenet"] == one.values["imagenet"] for one in slip.rows)
    ]
    clip, again = (load_table("pgs_robustness").row(name).values["imagenet"] for name in ("CLIP", "A-CLIP"))
    faster = values["SLIP"]["time"] / own["time"]
    return [
        Finding(
            "reading",
            "aclip_main",
            f"{faster:.2f}x faster is against SLIP; against CLIP, A-CLIP takes {own['time']:g} times as long, "
            f"A-CLIP-eff {values['A-CLIP-eff']['time']:g}",
        ),
        Finding(
            "reading",
            "maskclip",
            f"as its own paper has it {whole['imagenet']:g}, not the {shown['imagenet']:g} of A-CLIP's table; better "
            f"than A-CLIP in {len(ahead)} of 5 columns",
        ),
        Finding(
            "reading",
            "slip",
            f"A-CLIP's rows {'; '.join(copied)} are this table's: trained without gradient through the gather, "
            "A-CLIP with",
        ),
        Finding(
            "reading", "pgs_robustness", f"A-CLIP run again on CC12M: {again:g} against {clip:g} of CLIP on ImageNet"
        ),
        *_suite_average(),
    ]


def _suite_average() -> list[Finding]:
    """Whether ImageNet is in A-CLIP's average of 25 tasks: the printed mean is nearer to that of all 26 columns."""
    table = load_table("aclip_26")
    counted = table.means["avg"]
    tasks = [column for column in counted if column != "imagenet"]
    gaps = [
        [abs(_mean([row.values[column] for column in columns]) - row.values["avg"]) for row in table.rows]
        for columns in (counted, tasks)
    ]
    if max(gaps[0]) >= min(gaps[1]):
        return []
    text = f"the printed average of {len(tasks)} tasks counts ImageNet as number {len(counted)}"
    return [Finding("reading", "aclip_26", text)]
