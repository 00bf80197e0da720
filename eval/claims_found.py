"""What claims are held against, computed from the result files; accuracy in points, times as ratios, nothing is run."""

import math
from collections.abc import Collection
from pathlib import Path

from eval.claims_files import COMMANDS, Files
from eval.claims_rules import Found, NotMeasured
from eval.pretrain_study_report import MAIN, verdicts
from eval.records import DENSE, read_records, read_sides
from eval.report_data import title_of
from eval.report_rows import Measured, difference

PAIRED = "95 % paired bootstrap over images"


def accuracy_gain(
    files: Files, first: str, second: str, macs: float, without: Collection[str] = (), how: str = ""
) -> Found:
    """Points of top-1 accuracy by which `first` is ahead of `second` at one budget, mean over data sets."""
    pairs = files.pairs(first, second, macs, without)
    gain = difference(list(pairs.values()), "correct")
    sets = ", ".join(map(title_of, pairs))
    return Found(
        value=100 * gain.mean,
        low=100 * gain.low,
        high=100 * gain.high,
        spread=PAIRED,
        setting=f"ViT-Ti/16 classifier, {sets}, {gain.num_images:,} images, {100 * macs:g} % of the MACs{how}",
        command=COMMANDS["eval"],
    )


def accuracy_loss(files: Files, method: str, macs: float, how: str = "") -> Found:
    """Points of top-1 accuracy that a pruned tower loses, mean over data sets."""
    return accuracy_gain(files, DENSE, method, macs, how=how)


def study_gain(files: Files, recipe: str, base: str, flags: str = "") -> Found:
    """Points by which a pretraining recipe is ahead of another in the study: mean over its data sets' main metrics.

    Main metrics are accuracy, and recall from text to image at 5. Both recipes are of the same tier (equal budget);
    the interval adds those of the metrics as independent ones. A recipe of tier 1 counts once it has two seeds; the
    other tiers have one by design. Args: flags of the study that has both recipes.
    """
    study = files.json("pretrain_study.json")
    rows = [row for row in study["rows"] if row["recipe"] in (recipe, base)]
    found = [one for one in verdicts(rows, base) if one["metric"].endswith((" accuracy", MAIN))]
    found = [one for one in found if one["tier"] == min(other["tier"] for other in found)]
    if not found:
        raise NotMeasured(COMMANDS["pretrain_study.json"] + flags)
    tier = found[0]["tier"]
    seeds = min(sum(row["recipe"] == name and row["tier"] == tier for row in rows) for name in (recipe, base))
    if tier == 1 and seeds < 2:
        raise NotMeasured(COMMANDS["pretrain_study.json"] + flags)
    value, half = mean_of([(one["difference"], one["interval"][1] - one["difference"]) for one in found])
    names = ", ".join(one["metric"] for one in found)
    return Found(
        value=100 * value,
        low=100 * (value - half),
        high=100 * (value + half),
        spread="95 % over test pictures and seeds",
        setting=f"small towers, {study['data']}, {study['minutes'][tier - 1]:g} processor minutes a run, "
        f"{seeds} seed{'s' * (seeds > 1)}, mean of {names}",
        command=study["command"],
    )


def mean_of(parts: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean of independent values, and its half interval from theirs."""
    return sum(value for value, _ in parts) / len(parts), math.hypot(*(half for _, half in parts)) / len(parts)


def time_ratio(files: Files, recipe: str, base: str = "clip") -> Found:
    """Time of a training step of a recipe over that of another one; the range is over rounds."""
    cost, row = files.json("pretrain_cost.json"), files.row("pretrain_cost.json", recipe=recipe)
    other = {"time_ratio": 1.0, "time_ratio_low": 1.0, "time_ratio_high": 1.0}
    if base != "clip":
        other = files.row("pretrain_cost.json", recipe=base)
    return Found(
        value=row["time_ratio"] / other["time_ratio"],
        low=row["time_ratio_low"] / other["time_ratio_high"],
        high=row["time_ratio_high"] / other["time_ratio_low"],
        spread="least and most of the rounds",
        setting=f"{cost['model']}, {cost['threads']} CPU threads, batch {cost['batch_size']}, loading not timed; "
        f"{row['macs_ratio']:.2f} times plain CLIP's MACs",
        command=cost["command"],
    )


def models_gain(files: Files, folder: str, recipe: str, base: str, without: Collection[str], command: str) -> Found:
    """Points by which the unpruned tower of one pretrained model is ahead of another's, mean over data sets.

    Records of both lie in a folder of the results; a model is told by its recipe's name in its own.
    """
    there = self_named(files.folder / folder, (recipe, base))
    pairs = [
        (there[recipe, key], there[base, key])
        for name, key in there
        if name == recipe and (base, key) in there and key[0] not in without
    ]
    if not pairs:
        raise NotMeasured(command)
    gain = difference(pairs, "correct")
    return Found(
        value=100 * gain.mean,
        low=100 * gain.low,
        high=100 * gain.high,
        spread=PAIRED,
        setting=f"{pairs[0][0].record.model}, {len(pairs)} data sets, {gain.num_images:,} questions",
        command=command,
    )


def self_named(folder: Path, recipes: Collection[str]) -> dict[tuple, Measured]:
    """(recipe, (data set, split)) -> record of its unpruned tower, for models named as `tier1-pgs-0.5-seed0`."""
    records = read_records(folder) if folder.is_dir() else []
    return {
        (recipe, (record.dataset, record.split)): Measured(record, read_sides(folder, record))
        for record in records
        for recipe in recipes
        if record.method == DENSE and f"-{recipe}-" in f"-{record.model}-"
    }
