"""What a run reports: JSON of numbers with where they come from, one summary line, and the table of rivals."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from patchrank.macs import dense_macs
from patchrank.provenance import command, machine, versions
from patchrank.pruned import PrunedTower
from patchrank.scorers import PositionPrior, mean_rank_prior
from patchrank.search.store import RankingStore
from patchrank.spec import PruneSpec
from patchrank.tokens import num_keep
from predictors.cache import first
from predictors.config import TrainConfig
from predictors.costs import share_of_macs
from predictors.judging import Row, compare, cosines, judge, paired_interval, pruned_features, rivals
from predictors.prepare import Images
from predictors.schedules import at_keep


def make_report(
    program: str, pruned: PrunedTower, feature_nD: Tensor, before: PrunedTower, images: Images, found: dict[str, Any]
) -> dict:
    """Numbers of `pruned`, whose features of the held-out images are `feature_nD`, beside and paired with those of
    `before` (untrained, or frozen)."""
    tokens = images.held_out
    before_nD = pruned_features(before, tokens, pruned.spec.cuts[0][0])
    gain = paired_interval(cosines(feature_nD, tokens.feature_nD), cosines(before_nD, tokens.feature_nD))
    return {
        "command": command(program),
        "versions": versions(),
        "machine": machine(),
        "spec": pruned.spec.to_dict(),
        "dense_image_macs": dense_macs(pruned.config),
        "macs_share": share_of_macs(pruned),
        "num_train": len(images.train),
        "num_held_out": len(tokens),
        "held_out": judge(feature_nD, tokens, images.classify),
        "before": {"macs_share": share_of_macs(before)} | judge(before_nD, tokens, images.classify),
        "cosine_gain": {"mean": gain[0], "ci95": list(gain[1:])},
        **found,
    }


def summary(report: dict[str, Any]) -> str:
    """One line for the terminal."""
    now, was = report["held_out"], report["before"]
    low, high = report["cosine_gain"]["ci95"]
    text = f"{report['mode']}: cosine {was['cosine']:.4f} -> {now['cosine']:.4f} (gain 95 % {low:+.4f} to {high:+.4f})"
    if "agreement" in now:
        text += f", top-1 agreement {100 * was['agreement']:.1f} -> {100 * now['agreement']:.1f} %"
    return f"{text} on {report['num_held_out']} held-out images at {report['macs_share']:.3f} of the dense MACs"


def without_training(spec: PruneSpec) -> PruneSpec:
    """The same cuts for scorers that need no training: their scores are priorities, no log importances."""
    return replace(spec, select="suppress" if spec.select == "cover" else spec.select, num_added=0)


def closing_table(
    config: TrainConfig, pruned: PrunedTower, images: Images, store: RankingStore | None = None
) -> list[Row]:
    """The trained scorer beside those that need no training, at every keep of --table-keep, with fold and with drop.

    With a store, the mean-rank prior of its golden orders stands among the rivals.
    """
    tower, config_of = pruned.tower, pruned.config
    scorers = rivals(tower)
    if store is not None:
        scorers["mean-rank"] = PositionPrior(mean_rank_prior(store.order_BN))
    methods: dict[str, Callable[[PruneSpec], PrunedTower]] = {
        "trained": lambda spec: PrunedTower(tower, replace(spec, num_added=0), pruned.scorer)
    }
    methods |= {
        name: lambda spec, scorer=scorer: PrunedTower(tower, without_training(spec), scorer)
        for name, scorer in scorers.items()
    }
    if pruned.added is not None:
        methods["trained + tokens"] = lambda spec: PrunedTower(tower, spec, pruned.scorer, pruned.added)
    num_patches = config_of.num_patches
    specs = [at_keep(pruned.spec, num_keep(keep, num_patches), num_patches) for keep in config.table_keep]
    return compare(methods, specs, first(images.held_out, config.table), pruned.spec.cuts[0][0], images.classify)


def rows_of(table: list[Row]) -> list[dict[str, Any]]:
    """Rows as JSON."""
    return [asdict(row) for row in table]
