"""The pruned walk with gates: the same features at real keep sets, and a gradient to every score.

Every patch has a gate, 1 if it is kept and almost 0 if not; its weight as an attention key is multiplied by the gate,
and under fold the share 1 - gate of its content moves to its nearest kept patch. A patch that is gone stays in the
sequence until the next cut (behind the last one to the end), so a score sees what its patch would have been worth up
to the next decision, and several cuts cost little more than the true walk. The gates
take their values from the hard selection and their gradient from the standardised scores (straight-through, Bengio et
al. 2013), so the forward pass is what inference does and cannot be escaped by half-open gates. The batched form, with
several cuts, of `patchrank.search.gates`.

Letters: B batch, P prefix tokens, A patches alive before a cut, K kept, S patches in the sequence (alive first, then
those that went at the last cut), C width, M metric channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.pruned import PrunedTower, State
from patchrank.tokens import gather_tokens, rank
from predictors.scorers import standardise

_CLOSED = 1e-6
"""Gate of a patch that is gone: its weight is lost in rounding, its gradient is not."""
_WIDTH = 0.5
"""Width of the band of scores, in standard deviations, in which a patch may still change sides."""
_SOFTNESS = 0.1
"""Temperature on the cosine of the soft assignment that lends its gradient to a learned metric."""


@dataclass(frozen=True)
class Perturb:
    """Gaussian noise on the standardised scores before selection, so that training sees keep sets near the best.

    It is drawn for a whole batch; a process that has a part of it sees its own `rows` of that.
    """

    scale: float
    generator: torch.Generator
    rows: slice | None = None
    num_rows: int | None = None
    """Images of the whole batch; None: those at hand."""

    def __call__(self, score_BN: Tensor) -> Tensor:
        shape = (self.num_rows or len(score_BN), *score_BN.shape[1:])
        noise_BN = torch.randn(shape, generator=self.generator, dtype=score_BN.dtype)[self.rows or slice(None)]
        return score_BN + self.scale * noise_BN.to(score_BN.device)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Value of `hard`, gradient of `soft`."""
    return hard + (soft - soft.detach())


def gates(score_BA: Tensor, K: int, slope: float = 1.0) -> Tensor:
    """Hard gates (B, A) of falling scores (B, A): 1 for the first K, almost 0 for the others, with a slope in between.

    The slope is that of a sigmoid around the threshold between rank K and K + 1, in standard deviations, less its mean:
    what lifts all scores alike changes no set. Args: slope, a factor on it; 0: no gradient through the selection.
    """
    hard_A = torch.full_like(score_BA[0], _CLOSED)
    hard_A[:K] = 1.0
    if not score_BA.requires_grad or score_BA.shape[1] == K:
        return hard_A.expand_as(score_BA)
    with torch.no_grad():
        scale_B1 = score_BA.std(-1, keepdim=True).clamp_min(1e-6) * _WIDTH
        threshold_B1 = score_BA[:, K - 1 : K + 1].mean(-1, keepdim=True)
        open_BA = ((score_BA - threshold_B1) / scale_B1).sigmoid()
        slope_BA = open_BA * (1 - open_BA)
    mean_B1 = (slope_BA * score_BA).sum(-1, keepdim=True) / slope_BA.sum(-1, keepdim=True).clamp_min(1e-6)
    return straight_through(hard_A.expand_as(score_BA), slope * slope_BA * (score_BA - mean_B1) / scale_B1)


def host_weights(metric_BAM: Tensor, K: int) -> Tensor:
    """For every patch its nearest kept one other than itself, one-hot (B, A, K); the first K patches are the kept.

    The gradient is that of a softmax over the cosines. With K = 1 the kept patch is its own host.
    """
    unit_BAM = F.normalize(metric_BAM, dim=-1)
    cosine_BAK = unit_BAM @ unit_BAM[:, :K].mT
    itself_AK = torch.eye(metric_BAM.shape[1], K, dtype=torch.bool, device=metric_BAM.device)
    cosine_BAK = cosine_BAK.masked_fill(itself_AK, -2.0)
    hard_BAK = F.one_hot(cosine_BAK.argmax(-1), K).to(metric_BAM.dtype)
    return straight_through(hard_BAK, (cosine_BAK / _SOFTNESS).softmax(-1)) if metric_BAM.requires_grad else hard_BAK


def gated_fold(
    x_BAC: Tensor,
    size_BA: Tensor,
    gate_BA: Tensor,
    host_BAK: Tensor,
    merge_norm: str,
    weight_BA: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens (B, A, C) and sizes (B, A) after every patch gave the share 1 - gate of itself to its host.

    Args: weight (B, A): how much a patch counts in a merged token beside its size; None: all alike.
    """
    K = host_BAK.shape[-1]
    part_BA1 = (size_BA if weight_BA is None else size_BA * weight_BA).unsqueeze(-1)
    own_BK1, share_BA1 = part_BA1[:, :K], (1 - gate_BA).unsqueeze(-1) * part_BA1
    total_BK1 = own_BK1 + host_BAK.mT @ share_BA1
    merged_BKC = (x_BAC[:, :K] * own_BK1 + host_BAK.mT @ (share_BA1 * x_BAC)) / total_BK1
    if merge_norm == "preserve":
        norm_BA1 = x_BAC.norm(dim=-1, keepdim=True)
        target_BK1 = norm_BA1[:, :K] * own_BK1 + host_BAK.mT @ (share_BA1 * norm_BA1)
        merged_BKC = merged_BKC * (target_BK1 / total_BK1 / merged_BKC.norm(dim=-1, keepdim=True))
    guests_BA1 = ((1 - gate_BA) * size_BA).unsqueeze(-1)
    size_BK = size_BA[:, :K] + (host_BAK.mT @ guests_BA1).squeeze(-1)
    return torch.cat([merged_BKC, x_BAC[:, K:]], dim=1), torch.cat([size_BK, size_BA[:, K:]], dim=1)


@dataclass
class _Walk:
    """Where a batch stands; `weight_BS` is what each patch counts as an attention key."""

    x_BLC: Tensor
    num_prefix: int
    num_alive: int
    position_BA: Tensor
    size_BA: Tensor
    weight_BS: Tensor

    def key_weights(self) -> Tensor:
        """Weights (B, P + S) of all tokens as keys."""
        ones_BP = self.weight_BS.new_ones(self.weight_BS.shape[0], self.num_prefix)
        return torch.cat([ones_BP, self.weight_BS], dim=1)

    def bias(self) -> Tensor:
        return self.key_weights().log()[:, None, None, :]


def _state(pruned: PrunedTower, walk: _Walk, layer: int, folded: bool, inside: dict[str, Tensor]) -> State:
    """What a scorer may see: the patches that are alive. Args: inside, fields that a cut inside a block adds."""
    num_tokens = walk.num_prefix + walk.num_alive
    return State(
        x_BLC=walk.x_BLC[:, :num_tokens],
        num_prefix=walk.num_prefix,
        position_BN=walk.position_BA,
        size_BN=walk.size_BA if folded else None,
        block=pruned.tower.blocks[layer],
        grid=pruned.config.grid,
        **inside,
    )


def _cut(
    pruned: PrunedTower,
    walk: _Walk,
    layer: int,
    K: int,
    perturb: Perturb | None,
    scores: list,
    inside: dict[str, Tensor],
) -> _Walk:
    """One cut: alive patches in score order, the first K open, the others closed."""
    spec, first = pruned.spec, not scores
    state = _state(pruned, walk, layer, spec.rest == "fold" and not first, inside)
    key_BAM = None if state.key_BLC is None else state.block.mean_head(state.key_BLC[:, state.num_prefix :])
    raw_BA = pruned.scorer(state)
    scores.append(raw_BA)
    metric_BAM = pruned.nearness(state, key_BAM) if spec.rest == "fold" or spec.covers else None
    seen_BA = raw_BA if spec.select == "cover" else standardise(raw_BA)
    chosen_BA = seen_BA if perturb is None else perturb(seen_BA)
    final_BA = pruned.final_score(state, chosen_BA, metric_BAM)
    order_BA = rank(final_BA.detach())
    # A priority moves no score by itself: it says who of two like patches goes, so it gets the slope of its own patch.
    sloped_BA = standardise(final_BA) + chosen_BA if spec.select == "suppress" else final_BA
    gate_BA = gates(sloped_BA.gather(1, order_BA), K)
    x_BAC, size_BA = gather_tokens(state.patches_BNC, order_BA), walk.size_BA.gather(1, order_BA)
    weight_BA = gate_BA
    if spec.rest == "fold":
        host_BAK = host_weights(gather_tokens(metric_BAM, order_BA), K)
        merge_weight = getattr(pruned.scorer, "merge_weight", None)
        share_BA = None if merge_weight is None else merge_weight(raw_BA).gather(1, order_BA)
        x_BAC, size_BA = gated_fold(x_BAC, size_BA, gate_BA, host_BAK, spec.merge_norm, share_BA)
        weight_BA = gate_BA * size_BA
    joins = pruned.added is not None and first
    added_BTC = pruned.added(state, final_BA.detach(), K) if joins else walk.x_BLC[:, :0]
    return _Walk(
        x_BLC=torch.cat([walk.x_BLC[:, : walk.num_prefix], added_BTC, x_BAC], dim=1),
        num_prefix=walk.num_prefix + added_BTC.shape[1],
        num_alive=K,
        position_BA=walk.position_BA.gather(1, order_BA)[:, :K],
        size_BA=size_BA[:, :K],
        weight_BS=weight_BA,
    )


def smooth_features(
    pruned: PrunedTower, x_BLC: Tensor, layer: int, perturb: Perturb | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Feature (B, D) of unpruned tokens (B, P + N, C) before block `layer`, and the raw scores (B, A) of every cut.

    Without `perturb` the feature is `pruned.forward_from(x_BLC, layer)` up to the rounding of closed gates; it is
    differentiable in the scorer, its metric and the added tokens. Raises: ValueError without `size_bias`: gates lie in
    it, and calibration, which trains it away, takes the true walk.
    """
    tower, spec = pruned.tower, pruned.spec
    if not spec.size_bias:
        raise ValueError("size_bias=False: gates act through the size bias; train with it, calibrate without")
    counts = dict(spec.counts(pruned.config.num_patches))
    num_prefix, num_patches = pruned.config.num_prefix, pruned.config.num_patches
    position_BN = torch.arange(num_patches, device=x_BLC.device).expand(x_BLC.shape[0], -1)
    ones_BN = x_BLC.new_ones(x_BLC.shape[0], num_patches)
    walk = _Walk(x_BLC, num_prefix, num_patches, position_BN, ones_BN, ones_BN)
    scores: list[Tensor] = []
    for place in range(layer, max(counts) + 1):
        if place in counts and spec.where == "before":
            walk = _cut(pruned, walk, place, counts[place], perturb, scores, {})
        if place == max(counts) and spec.where == "before":
            return tower.finish(walk.x_BLC, place, walk.key_weights(), walk.num_prefix), scores
        block, entry_BPC = tower.blocks[place], walk.x_BLC[:, : walk.num_prefix]
        walk.x_BLC, key_BLC = block.attend(walk.x_BLC, walk.bias())
        if place in counts and spec.where == "inside":
            inside = {"entry_BPC": entry_BPC, "key_BLC": key_BLC[:, : walk.num_prefix + walk.num_alive]}
            walk = _cut(pruned, walk, place, counts[place], perturb, scores, inside)
        walk.x_BLC = block.mlp(walk.x_BLC)
    return tower.finish(walk.x_BLC, max(counts) + 1, walk.key_weights(), walk.num_prefix), scores
