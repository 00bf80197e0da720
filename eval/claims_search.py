"""Findings about golden rankings, speed and prompts, from search_cost, search_truth, export_bench and prompt.json."""

import statistics

from eval.claims_files import COMMANDS, Files
from eval.claims_rules import Found, NotMeasured

_TINY = "ViT-Ti/16 classifier, Tiny-ImageNet"
_DROP = "drop"
"""The papers' treatment of the patches that are not kept."""


def headroom(files: Files, strategy: str) -> Found:
    """Share of exact greedy's gain over the best free scorer that a strategy recovers, in the deletion curve."""
    row = files.row("search_cost.json", strategy=strategy, rest=_DROP)
    low, high = row["quality_interval"]
    return Found(
        value=row["quality"],
        low=low,
        high=high,
        spread="95 % bootstrap over images",
        setting=f"{_TINY}, {row['num_images']} images, cosine to the unpruned feature; 0 is {row['best_free']}",
        command=files.json("search_cost.json")["command"],
    )


def curve_gain(files: Files, strategy: str, others: tuple[str, ...]) -> Found:
    """Mean cosine over keep 0.3 .. 0.7 by which a search is ahead of the best of some free scorers.

    The interval is that of two unpaired means, end to end: wider than a paired one.
    """
    mine = files.row("search_cost.json", strategy=strategy, rest=_DROP)
    rows = [files.row("search_cost.json", strategy=name, rest=_DROP) for name in others]
    best = max(rows, key=lambda row: row["auc"])
    (low, high), (other_low, other_high) = mine["auc_interval"], best["auc_interval"]
    return Found(
        value=mine["auc"] - best["auc"],
        low=low - other_high,
        high=high - other_low,
        spread="ends of both 95 % intervals, not paired",
        setting=f"{_TINY}, {mine['num_images']} images, cosine to the unpruned feature; the best of them: "
        f"{best['strategy']}",
        command=files.json("search_cost.json")["command"],
    )


def golden_gain(files: Files, criterion: str, keep: str) -> Found:
    """Points of accuracy by which the sweep's golden keep sets are ahead of the unpruned tower."""
    row = files.row("search_truth.json", strategy="sweep", criterion=criterion, rest=_DROP)
    if keep not in row["minus_dense_at_keep"]:
        raise NotMeasured(COMMANDS["search_truth.json"])
    low, high = row["minus_dense_interval_at_keep"][keep]
    return Found(
        value=100 * row["minus_dense_at_keep"][keep],
        low=100 * low,
        high=100 * high,
        spread="95 % paired bootstrap over images",
        setting=f"{_TINY}, {row['num_images']:,} images, one sweep, one cut at layer "
        f"{files.json('search_truth.json').get('settings', {}).get('layer', 3)}",
        command=files.json("search_truth.json")["command"],
    )


def golden_loss(files: Files, criterion: str, keep: str) -> Found:
    """The same as points lost."""
    return _turned(golden_gain(files, criterion, keep))


def _turned(found: Found) -> Found:
    return Found(**vars(found) | {"value": -found.value, "low": -found.high, "high": -found.low})


def golden_match(files: Files, column: str, from_rankings: bool) -> Found:
    """Overlap of the best trained scorer's keep sets with the golden ones, 0 for chance and 1 for equal sets.

    Args: column: "match", or "minus_mean_rank" for what it has beyond the position alone; from_rankings: only scorers
    that were trained on golden rankings.
    """
    report = files.json("golden_match.json")
    trained = [row for row in report["rows"] if row["trained"] and row["from_rankings"] >= from_rankings]
    if not trained:
        raise NotMeasured(COMMANDS["golden_match.json"])
    best, settings = max(trained, key=lambda row: row["match"]), report["settings"]
    low, high = best[f"{column}_interval"]
    taught = "golden rankings" if best["from_rankings"] else "features, not on rankings"
    others = {row["method"]: row["match"] for row in report["rows"]}
    free = ", ".join(f"{name} {others[name]:.2f}" for name in ("class-attention", "mean-rank") if name in others)
    return Found(
        value=best[column],
        low=low,
        high=high,
        spread="95 % bootstrap over images",
        setting=f"ViT-Ti/16 classifier, {settings['data']}, {report['num_images']} images, golden order by "
        f"{settings['strategy']}, a scorer trained on {taught}; matches beside its {best['match']:.2f}: {free}",
        command=report["command"],
    )


def speed_up(files: Files, batch: int) -> Found:
    """Time of the dense graph over that of the one-cut graph at keep 0.6, float32; all such runs."""
    bench = files.json("export_bench.json")
    wanted = {"model": "ViT-B-16", "variant": "drop-1", "runtime": "onnxruntime-cpu", "precision": "float32"}
    wanted |= {"batch": batch, "keep": 0.6}
    rows = [row for row in bench["rows"] if all(row[key] == value for key, value in wanted.items())]
    if not rows:
        raise NotMeasured(COMMANDS["export_bench.json"])
    return Found(
        value=statistics.median(row["speedup"] for row in rows),
        low=min(row["speedup_quartiles"][0] for row in rows),
        high=max(row["speedup_quartiles"][1] for row in rows),
        spread=f"quartiles of {len(rows)} run{'s' * (len(rows) > 1)}",
        setting=f"ONNX Runtime on {rows[0]['threads']} CPU threads, batch {batch}, random weights; compute falls "
        f"{rows[0]['ideal_speedup']:.2f} times",
        command=bench["command"],
    )


def prompt_loss(files: Files, tokens: str = "text + visual") -> Found:
    """Points lost by pruning a prompt-tuned model, against the same tuning of the dense one."""
    report, row = files.json("prompt.json"), files.row("prompt.json", name=f"tuned pruned ({tokens})")
    settings = report["settings"]
    low, high = row["loss_ci95"]
    return Found(
        value=100 * row["loss"],
        low=100 * low,
        high=100 * high,
        spread="95 % paired bootstrap over images, seeds averaged",
        setting=f"{settings.get('model', '')}, {settings.get('data', '')}, {report['num_images']:,} images, "
        f"{100 * row['macs_share']:.0f} % of the MACs with its tokens",
        command=report["command"],
    )


def prompt_gain(files: Files) -> Found:
    """Points of the loss that visual tokens take away from text-only tuning; ends of both intervals, not paired."""
    without, with_tokens = prompt_loss(files, "text"), prompt_loss(files)
    return Found(
        value=without.value - with_tokens.value,
        low=without.low - with_tokens.high,
        high=without.high - with_tokens.low,
        spread="ends of both 95 % intervals, not paired",
        setting=with_tokens.setting,
        command=with_tokens.command,
    )
