"""Multiply-accumulates of a pruned tower with all that was learned: scorer, metric and added tokens included."""

from dataclasses import replace

from patchrank.macs import dense_macs, patches_at_cuts, pruned_macs
from patchrank.presets import Cost
from patchrank.pruned import PrunedTower, Scorer
from patchrank.salient import share_macs
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig


def scorer_macs(scorer: object, config: TowerConfig, spec: PruneSpec) -> int:
    """MACs of all calls of a scorer under `spec`; a scorer that says nothing about its cost counts as free."""
    if not hasattr(scorer, "macs"):
        return 0
    share = share_macs(config, spec) if getattr(scorer, "power", None) is not None else 0
    return sum(scorer.macs(num_patches) for num_patches in patches_at_cuts(config, spec)) + share


def learned_macs(config: TowerConfig, spec: PruneSpec, scorer: object, added: object = None) -> int:
    """MACs of the pruned tower with this scorer, its metric and these added tokens."""
    extra = scorer_macs(scorer, config, spec)
    if spec.cuts and hasattr(added, "macs"):
        extra += added.macs(config.num_patches, spec.counts(config.num_patches)[0][1])
    return pruned_macs(config, spec, scorer=extra, metric_dim=getattr(scorer, "metric_dim", 0) or None)


def cost_with(scorer: Scorer, added: object = None, num_added: int = 0) -> Cost:
    """A cost for `patchrank.presets.resolve_spec` that counts what was learned; without cuts, the dense tower's."""

    def cost(config: TowerConfig, spec: PruneSpec) -> int:
        spec = replace(spec, num_added=num_added) if spec.cuts else spec
        return learned_macs(config, spec, scorer, added)

    return cost


def share_of_macs(pruned: PrunedTower) -> float:
    """MACs of a pruned tower over those of the dense one, in (0, 1] and a little."""
    return learned_macs(pruned.config, pruned.spec, pruned.scorer, pruned.added) / dense_macs(pruned.config)
