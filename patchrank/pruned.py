"""PrunedTower: the walk of one batch through a frozen tower that looks at fewer patches.

    image -> embed -> blocks[0:layer] -> scorer -> top-k -> gather (+ fold) (+ added tokens) -> blocks[layer:] -> head

Letters: B batch, P prefix tokens, N patches present, K kept, R = N - K rest, L tokens, C width, M metric channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from patchrank.spec import PruneSpec
from patchrank.tokens import (
    assign_to_nearest,
    cover,
    fold_sizes,
    fold_tokens,
    gather_tokens,
    rank,
    suppress,
    unfold_tokens,
)
from patchrank.tower import Block, VisionTower


@dataclass(frozen=True, kw_only=True)
class State:
    """The tokens of a batch at one point of the walk; all that a scorer may look at."""

    x_BLC: Tensor
    num_prefix: int
    position_BN: Tensor
    """Original index of every patch that is still present, int64."""
    size_BN: Tensor | None
    """Number of original patches that each one stands for, float; None while nothing was folded."""
    block: Block
    """The block that the cut stands before or in."""
    grid: tuple[int, int]
    entry_BPC: Tensor | None = None
    """Inside a block: the prefix as it entered that block; None before one."""
    key_BLC: Tensor | None = None
    """Inside a block: its keys of all tokens; None before one."""

    @property
    def patches_BNC(self) -> Tensor:
        """The patches that are present."""
        return self.x_BLC[:, self.num_prefix :]


@dataclass(frozen=True)
class Cut:
    """What one cut did, in indices into the patches that were present before it."""

    keep_BK: Tensor
    rest_BR: Tensor
    assign_BR: Tensor | None
    """Index into `keep_BK` of the host of every rest patch; None under drop."""


Scorer = Callable[[State], Tensor]
"""State -> score (B, N) float32, higher = keep (a priority, if the spec selects by `suppress`; a log importance,
if by `cover`)."""


def start_state(tower: VisionTower, x_BLC: Tensor, layer: int) -> State:
    """State of unpruned tokens (B, P + N, C) that are about to enter block `layer`."""
    num_prefix = tower.config.num_prefix
    num_patches = x_BLC.shape[1] - num_prefix
    position_BN = torch.arange(num_patches, device=x_BLC.device).expand(x_BLC.shape[0], -1)
    return State(
        x_BLC=x_BLC,
        num_prefix=num_prefix,
        position_BN=position_BN,
        size_BN=None,
        block=tower.blocks[layer],
        grid=tower.config.grid,
    )


def fold_metric(state: State) -> Tensor:
    """What nearness means when folding before a block: its keys of the patches, mean over heads; (B, N, M).

    Source: ToMe (Bolya et al. 2023, section 3) merges by the mean of the keys over heads.
    """
    return state.block.mean_head(state.block.keys(state.x_BLC)[:, state.num_prefix :])


def apply_cut(
    state: State,
    order_BN: Tensor,
    K: int,
    spec: PruneSpec,
    metric_BNM: Tensor | None,
    added_BTC: Tensor | None = None,
    weight_BN: Tensor | None = None,
) -> tuple[State, Cut]:
    """Keep the first K patches of `order_BN`, drop or fold the rest, let added tokens join the prefix.

    Args: order (B, N) int64, best first; metric (B, N, M), needed under fold; weight (B, N) float > 0, how much a patch
    counts in a merged token beside its size (None: all alike). Sizes stay numbers of patches.
    Returns: the state behind the cut, and what was done.
    """
    keep_BK, rest_BR = order_BN[:, :K], order_BN[:, K:]
    patches_BNC = state.patches_BNC
    kept_BKC, assign_BR, size_BK = gather_tokens(patches_BNC, keep_BK), None, None
    if spec.rest == "fold":
        size_BN = state.size_BN
        if size_BN is None:
            size_BN = torch.ones(keep_BK.shape[0], patches_BNC.shape[1], dtype=kept_BKC.dtype, device=kept_BKC.device)
        size_BK = size_BN.gather(1, keep_BK)
        if rest_BR.shape[1] > 0:
            assign_BR = assign_to_nearest(gather_tokens(metric_BNM, rest_BR), gather_tokens(metric_BNM, keep_BK))
            share_BN = size_BN if weight_BN is None else size_BN * weight_BN.to(size_BN.dtype)
            kept_BKC, total_BK = fold_tokens(
                kept_BKC,
                gather_tokens(patches_BNC, rest_BR),
                assign_BR,
                share_BN.gather(1, keep_BK),
                share_BN.gather(1, rest_BR),
                merge_norm=spec.merge_norm,
            )
            size_BK = total_BK if weight_BN is None else fold_sizes(assign_BR, size_BK, size_BN.gather(1, rest_BR))
        else:
            assign_BR = rest_BR
    prefix_BPC = state.x_BLC[:, : state.num_prefix]
    joined = (prefix_BPC, kept_BKC) if added_BTC is None else (prefix_BPC, added_BTC, kept_BKC)
    after = replace(
        state,
        x_BLC=torch.cat(joined, dim=1),
        num_prefix=state.num_prefix + (0 if added_BTC is None else added_BTC.shape[1]),
        position_BN=state.position_BN.gather(1, keep_BK),
        size_BN=size_BK,
    )
    return after, Cut(keep_BK, rest_BR, assign_BR)


def size_with_prefix(state: State) -> Tensor | None:
    """Sizes (B, L) of all tokens, each prefix token counting one; None while nothing was folded."""
    if state.size_BN is None:
        return None
    return torch.cat([state.size_BN.new_ones(state.size_BN.shape[0], state.num_prefix), state.size_BN], dim=1)


def size_bias(state: State) -> Tensor | None:
    """Log sizes (B, 1, 1, L), added to every attention logit of that key; None while nothing was folded."""
    size_BL = size_with_prefix(state)
    return None if size_BL is None else size_BL.log()[:, None, None, :]


def finish(tower: VisionTower, state: State, layer: int) -> Tensor:
    """Blocks `layer` .. end and the head: feature (B, D)."""
    return tower.finish(state.x_BLC, layer, size_with_prefix(state), state.num_prefix)


class PrunedTower(nn.Module):
    """A frozen tower with cuts: same input and output as `VisionTower`, fewer tokens behind each cut.

    Args: tower; spec; scorer (State) -> score (B, N), asked again at every cut; added: optional module
    (State, score (B, N), K) -> (B, T, C) of compensation tokens, asked at the first cut only; metric: optional
    (State) -> (B, N, M) float, what nearness means in folding and suppressing. Without it the scorer's own `metric`
    decides where it has one (a learned scorer may bring one, and so it is stored with it), else the block's keys.
    A scorer may also bring `merge_weight`, score (B, N) -> weight (B, N), for `apply_cut`.
    Raises: UserError if a cut lies outside the tower.
    """

    def __init__(
        self,
        tower: VisionTower,
        spec: PruneSpec,
        scorer: Scorer,
        added: nn.Module | None = None,
        metric: Callable[[State], Tensor] | None = None,
    ) -> None:
        super().__init__()
        spec.check_layers(tower.config.num_layers)
        self.tower = tower
        self.spec = spec
        self.scorer = scorer
        self.added = added
        self.metric = metric
        self._K = dict(spec.counts(tower.config.num_patches))

    @property
    def config(self):
        """The tower's `TowerConfig`."""
        return self.tower.config

    def nearness(self, state: State, key_BNM: Tensor | None = None) -> Tensor:
        """What folding and suppressing compare, (B, N, M): a learned metric, or the keys (`key_BNM` if at hand)."""
        learned = getattr(self.scorer, "metric", None) if self.metric is None else self.metric
        if learned is not None:
            return learned(state)
        return fold_metric(state) if key_BNM is None else key_BNM

    def final_score(self, state: State, score_BN: Tensor, metric_BNM: Tensor | None) -> Tensor:
        """Scores (B, N) whose first K are kept, from the scorer's and, where `select` compares patches, `nearness`."""
        if self.spec.select == "suppress":
            return suppress(score_BN, metric_BNM)
        return cover(score_BN, metric_BNM, state.size_BN) if self.spec.select == "cover" else score_BN

    def cut(self, state: State, K: int, metric_BNM: Tensor | None, score_BN: Tensor | None) -> tuple[State, Cut]:
        """Score, select, gather or fold at one cut; `score_BN` stands in for the scorer where given."""
        score_BN = self.scorer(state) if score_BN is None else score_BN
        if self.spec.rest == "fold" or self.spec.covers:
            metric_BNM = self.nearness(state, metric_BNM)
        merge_weight = getattr(self.scorer, "merge_weight", None)
        weight_BN = None if merge_weight is None else merge_weight(score_BN)
        score_BN = self.final_score(state, score_BN, metric_BNM)
        joins = self.added is not None and state.num_prefix == self.tower.config.num_prefix
        added_BTC = self.added(state, score_BN, K) if joins else None
        return apply_cut(state, rank(score_BN), K, self.spec, metric_BNM, added_BTC, weight_BN)

    def _enter(self, state: State, layer: int, score_BN: Tensor | None, cuts: list[Cut]) -> State:
        """Stand before block `layer`, through the cut there if there is one."""
        state = replace(state, block=self.tower.blocks[layer])
        if self.spec.where == "before" and layer in self._K:
            state, cut = self.cut(state, self._K[layer], None, None if cuts else score_BN)
            cuts.append(cut)
        return state

    def _pass(self, state: State, layer: int, score_BN: Tensor | None, cuts: list[Cut]) -> State:
        """Go through block `layer`, and through the cut inside it if there is one."""
        bias_B11L = size_bias(state) if self.spec.size_bias else None
        if self.spec.where == "before" or layer not in self._K:
            return replace(state, x_BLC=state.block(state.x_BLC, bias_B11L))
        x_BLC, key_BLC = state.block.attend(state.x_BLC, bias_B11L)
        metric_BNM = state.block.mean_head(key_BLC[:, state.num_prefix :])
        inside = replace(state, x_BLC=x_BLC, entry_BPC=state.x_BLC[:, : state.num_prefix], key_BLC=key_BLC)
        state, cut = self.cut(inside, self._K[layer], metric_BNM, None if cuts else score_BN)
        cuts.append(cut)
        return replace(state, x_BLC=state.block.mlp(state.x_BLC), entry_BPC=None, key_BLC=None)

    def tokens(self, image_BCHW: Tensor, score_BN: Tensor | None = None) -> tuple[State, list[Cut]]:
        """Tokens behind the last block and every cut's record; `score_BN` (golden ranking) rules the first cut."""
        cuts: list[Cut] = []
        state = start_state(self.tower, self.tower.embed(image_BCHW), 0)
        return self._walk(state, 0, self.tower.config.num_layers, score_BN, cuts), cuts

    def _walk(self, state: State, start: int, stop: int, score_BN: Tensor | None, cuts: list[Cut]) -> State:
        """Blocks start .. stop-1 with their cuts."""
        for layer in range(start, stop):
            state = self._pass(self._enter(state, layer, score_BN, cuts), layer, score_BN, cuts)
        return state

    def forward(self, image_BCHW: Tensor, score_BN: Tensor | None = None) -> Tensor:
        """image (B, 3, H, W) -> feature (B, D), not normalised; `score_BN` as in `tokens`."""
        return self.forward_from(self.tower.embed(image_BCHW), 0, score_BN)

    def forward_from(self, x_BLC: Tensor, layer: int, score_BN: Tensor | None = None) -> Tensor:
        """Feature (B, D) of unpruned tokens (B, P + N, C) that are about to enter block `layer`, not behind any cut."""
        return self.features_and_cuts(x_BLC, layer, score_BN)[0]

    def features_and_cuts(self, x_BLC: Tensor, layer: int, score_BN: Tensor | None = None) -> tuple[Tensor, list[Cut]]:
        """`forward_from` together with every cut's record."""
        cuts: list[Cut] = []
        state, last = start_state(self.tower, x_BLC, layer), self.tower.config.num_layers - 1
        if self.tower.config.pool != "class":
            state = self._walk(state, layer, last + 1, score_BN, cuts)
            return self.tower.head(state.x_BLC, size_with_prefix(state), state.num_prefix), cuts
        # The class row is all that is read, so the last block computes no other.
        state = self._enter(self._walk(state, layer, last, score_BN, cuts), last, score_BN, cuts)
        size_BL = size_with_prefix(state) if self.spec.size_bias else None
        return self.tower.finish(state.x_BLC, last, size_BL, state.num_prefix), cuts

    def unfold(self, x_BKC: Tensor, cuts: list[Cut]) -> Tensor:
        """Patch tokens behind the last cut (B, K, C) back to all N positions, hosts standing in for their guests."""
        for cut in reversed(cuts):
            if cut.assign_BR is None:
                raise ValueError("unfold: dropped patches have no host; use a spec with rest='fold'")
            x_BKC = unfold_tokens(x_BKC, cut.keep_BK, cut.rest_BR, cut.assign_BR)
        return x_BKC
