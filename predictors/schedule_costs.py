"""What a schedule costs, stage by stage, in MACs or in measured milliseconds: one walk for both.

Letters: N patches, K kept, L tokens.
"""

from dataclasses import dataclass
from typing import Protocol

from patchrank.macs import attention_macs, block_macs, cut_macs, embed_macs, head_macs, mlp_macs
from patchrank.salient import query_macs
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig


class StageCosts(Protocol):
    """Costs of the stages of one batch; any unit, the same in all."""

    def start(self) -> float:
        """Embedding."""

    def keys(self, num_tokens: int) -> float:
        """Keys alone, for a cut before a block; inside one they are at hand."""

    def cut(self, num_patches: int, K: int) -> float:
        """Selection and fold, keys not counted."""

    def attend(self, num_tokens: int, sized: bool) -> float:
        """Attention half; `sized`: with sizes as a bias."""

    def mlp(self, num_tokens: int) -> float:
        """MLP half."""

    def last(self, num_tokens: int, sized: bool) -> float:
        """The last block for one row, where the tower pools by class token."""

    def head(self, num_tokens: int) -> float:
        """Pooling and projection."""


def total(costs: StageCosts, config: TowerConfig, spec: PruneSpec) -> float:
    """Cost of the pruned tower, in the unit of `costs`; a spec without cuts is the dense tower.

    Before a block keys cost twice under `select="cover"`: for nearness, and for how salient each patch is.
    """
    counts, patches, prefix = dict(spec.counts(config.num_patches)), config.num_patches, config.num_prefix
    num_keys, sized, found = int(spec.rest == "fold" or spec.covers) + (spec.select == "cover"), False, costs.start()
    for layer in range(config.num_layers):
        rows_only = config.pool == "class" and layer == config.num_layers - 1
        cuts_here = layer in counts and not (rows_only and spec.where == "inside")
        if cuts_here and spec.where == "before":
            found += num_keys * costs.keys(prefix + patches) + costs.cut(patches, counts[layer])
            patches, sized = counts[layer], spec.rest == "fold"
        if rows_only:
            found += costs.last(prefix + patches, sized)
            continue
        found += costs.attend(prefix + patches, sized)
        if cuts_here and spec.where == "inside":
            found += costs.cut(patches, counts[layer])
            patches, sized = counts[layer], spec.rest == "fold"
        found += costs.mlp(prefix + patches)
    return found + costs.head(prefix + patches)


@dataclass(frozen=True)
class MacCosts:
    """Multiply-accumulates per image; `manner` says how a cut selects (`cover` by `Salient`, whose row of queries is
    counted) and what becomes of the rest."""

    config: TowerConfig
    manner: PruneSpec

    def start(self) -> float:
        return embed_macs(self.config)

    def keys(self, num_tokens: int) -> float:
        return num_tokens * self.config.width**2

    def cut(self, num_patches: int, K: int) -> float:
        inside = PruneSpec(**(vars(self.manner) | {"where": "inside"}))
        query = query_macs(self.config, num_patches) if self.manner.select == "cover" else 0
        return query + cut_macs(self.config, inside, self.config.num_prefix + num_patches, num_patches, K)

    def attend(self, num_tokens: int, sized: bool) -> float:
        return attention_macs(self.config, num_tokens, num_tokens)

    def mlp(self, num_tokens: int) -> float:
        return mlp_macs(self.config, num_tokens)

    def last(self, num_tokens: int, sized: bool) -> float:
        return block_macs(self.config, num_tokens, 1)

    def head(self, num_tokens: int) -> float:
        return head_macs(self.config, num_tokens)
