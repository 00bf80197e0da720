"""The scorer for `select="cover"` that needs no training: how much the class token attends to each patch.

Letters: B batch, N patches present, P prefix tokens, C width.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from patchrank.macs import patches_at_cuts, pruned_macs
from patchrank.presets import Cost
from patchrank.pruned import State
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig

SALIENT = "salient"
"""Its name beside the rows of `patchrank.scorers.SCORERS`."""

POWER, SHARPNESS = 0.4, 0.3
"""Powers of the class attention in a patch's weight in selection, and of its standardised log in merging: the best of
a few that were tried on 300 Tiny-ImageNet train images with a ViT-Ti."""


def class_share(state: State) -> Tensor:
    """Share (B, N) of the class token's attention to patches, mean over heads, in the block of the cut.

    Inside a block the block's own keys serve, so this computes one row of queries; before one, all keys as well.
    """
    first_BPC = state.x_BLC if state.entry_BPC is None else state.entry_BPC
    key_BLC = state.block.keys(state.x_BLC) if state.key_BLC is None else state.key_BLC
    return state.block.class_saliency(first_BPC[:, :1], key_BLC[:, state.num_prefix :])


def query_macs(config: TowerConfig, num_patches: int) -> int:
    """MACs of one `class_share` whose keys are at hand: one row of queries, its products with the patches' keys."""
    return config.width * (config.width + num_patches)


def share_macs(config: TowerConfig, spec: PruneSpec) -> int:
    """MACs of `class_share` at all cuts of a spec."""
    counts = patches_at_cuts(config, spec)
    queries = sum(query_macs(config, num_patches) for num_patches in counts)
    if spec.where == "inside":
        return queries
    num_tokens = len(counts) * config.num_prefix + sum(counts) + max(0, len(counts) - 1) * spec.num_added
    return queries + num_tokens * config.width**2


class Salient(nn.Module):
    """(State) -> score (B, N) float32: POWER times the log of `class_share`; zeros for a tower without class token."""

    def __init__(self, has_class: bool = True) -> None:
        super().__init__()
        self.has_class = has_class

    def forward(self, state: State) -> Tensor:
        if not self.has_class:
            return state.patches_BNC.new_zeros(state.patches_BNC.shape[:2]).float()
        return POWER * class_share(state).float().clamp_min(1e-8).log()

    def merge_weight(self, score_BN: Tensor) -> Tensor:
        """What a patch counts in a merged token beside its size, (B, N) > 0."""
        centred_BN = score_BN - score_BN.mean(-1, keepdim=True)
        return (SHARPNESS * centred_BN / centred_BN.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)).exp()


def salient_cost(cost: Cost, has_class: bool = True) -> Cost:
    """The same cost with `Salient` counted."""

    def with_share(config: TowerConfig, spec: PruneSpec) -> int:
        return cost(config, spec) + (share_macs(config, spec) if spec.cuts and has_class else 0)

    return with_share


def default_scorer(config: TowerConfig, spec: PruneSpec | None = None) -> str:
    """Name of the scorer that goes with a spec (None: one of the presets) unless the caller names another."""
    wanted = config.num_prefix > 0 if spec is None else spec.select == "cover"
    return SALIENT if wanted else "random"


def salient_preset(
    preset: Callable[..., PruneSpec], config: TowerConfig, macs: float, *, rest: str = "fold"
) -> PruneSpec:
    """A preset of `patchrank.presets` for `Salient`: `select="cover"`, within the budget with the scorer counted.

    Args: preset `spec_for_macs` or `low_latency`; macs in (0, 1]. Raises: UserError for a budget out of reach.
    """
    cost = salient_cost(pruned_macs, config.num_prefix > 0)
    return replace(preset(config, macs, rest=rest, cost=cost), select="cover")
