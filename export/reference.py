"""What PyTorch says about the comparison's images: features, kept sets, and how close each decision was.

Letters: B batch, N patches, K kept, D feature, Y classes.
"""

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.serving import ServingGraph, kept_positions
from patchrank.pruned import Cut, PrunedTower, Scorer, State
from patchrank.tokens import gather_tokens

_CHUNK = 16


@dataclass
class Reference:
    """PyTorch's outputs for all images, in float32."""

    feature_BD: Tensor
    logit_BY: Tensor | None
    kept: list[Tensor]
    """Original positions (B, K) after each cut."""
    margin_B: Tensor
    """Smallest difference of the scores at rank K and K + 1, over the cuts; infinite without one."""
    host_margin_B: Tensor
    """Smallest difference of a folded patch's cosines to its best two hosts, over patches and cuts; infinite under
    drop."""


class _Watched(PrunedTower):
    """Notes the margin of every decision; decides nothing itself."""

    def __init__(self, pruned: PrunedTower) -> None:
        super().__init__(pruned.tower, pruned.spec, pruned.scorer, pruned.added, pruned.metric)
        self.margins: list[Tensor] = []
        self.host_margins: list[Tensor] = []

    def cut(self, state: State, K: int, metric_BNM: Tensor | None, score_BN: Tensor | None) -> tuple[State, Cut]:
        final_BN = self.scorer(state)
        if self.spec.covers:
            final_BN = self.final_score(state, final_BN, self.nearness(state, metric_BNM))
        ordered_BN = final_BN.sort(dim=-1, descending=True).values
        if ordered_BN.shape[1] > K:
            self.margins.append(ordered_BN[:, K - 1] - ordered_BN[:, K])
        after, cut = super().cut(state, K, metric_BNM, score_BN)
        if self.spec.rest == "fold" and K > 1 and cut.rest_BR.shape[1]:
            metric_BNM = F.normalize(self.nearness(state, metric_BNM), dim=-1)
            rest_BRM, kept_BKM = gather_tokens(metric_BNM, cut.rest_BR), gather_tokens(metric_BNM, cut.keep_BK)
            best_BR2 = (rest_BRM @ kept_BKM.mT).topk(2).values
            self.host_margins.append((best_BR2[..., 0] - best_BR2[..., 1]).amin(-1))
        return after, cut


class _Forced:
    """A scorer that says "keep" to given positions, cut after cut; in merging, patches weigh what the true one says."""

    def __init__(self, kept: list[Tensor], scorer: Scorer) -> None:
        self.kept, self.scorer, self.calls = kept, scorer, 0
        if hasattr(scorer, "merge_weight"):
            self.merge_weight = lambda score_BN: scorer.merge_weight(self.true_BN)

    def __call__(self, state: State) -> Tensor:
        kept_BK = self.kept[self.calls]
        self.calls += 1
        if hasattr(self, "merge_weight"):
            self.true_BN = self.scorer(state)
        member_BN = (state.position_BN.unsqueeze(2) == kept_BK.unsqueeze(1)).any(-1)
        # Among the kept ones the earlier in the list goes first, so that ties between hosts fall the same way.
        rank_BN = (state.position_BN.unsqueeze(2) == kept_BK.unsqueeze(1)).int().argmax(-1)
        return torch.where(member_BN, kept_BK.shape[1] - rank_BN, 0).float()


def _answers(graph: ServingGraph, feature_BD: Tensor) -> tuple[Tensor, Tensor | None]:
    outputs = graph.answer(feature_BD)
    return outputs[0], outputs[1] if graph.classes is not None else None


@torch.no_grad()
def reference(graph: ServingGraph, image_BHW3: Tensor) -> Reference:
    """Run the float32 module on uint8 images (B, H, W, 3)."""
    parts = []
    for chunk in image_BHW3.split(_CHUNK):
        watched = _Watched(graph.pruned).eval()
        feature_BD, cuts = watched.features_and_cuts(watched.tower.embed(graph.pixels(chunk)), 0)
        margins = [_smallest(found, len(chunk)) for found in (watched.margins, watched.host_margins)]
        parts.append((*_answers(graph, feature_BD), kept_positions(cuts), *margins))
    features, logits, kept, margins, host_margins = zip(*parts)
    return Reference(
        feature_BD=torch.cat(features),
        logit_BY=None if logits[0] is None else torch.cat(logits),
        kept=[torch.cat(of_cut) for of_cut in zip(*kept)],
        margin_B=torch.cat(margins),
        host_margin_B=torch.cat(host_margins),
    )


def _smallest(margins: list[Tensor], num_images: int) -> Tensor:
    """Per image over the cuts; infinite where nothing was decided."""
    return torch.stack([*margins, torch.full((num_images,), float("inf"))]).amin(0)


@torch.no_grad()
def forced(graph: ServingGraph, image_BHW3: Tensor, kept: list[Tensor], *, half: bool = False) -> tuple:
    """Unit features (B, D), and logits (B, Y) or None, with every cut's kept set given; in float32 or torch's float16.

    Args: kept, original positions (B, K) int64 of each cut, best first.
    """
    pruned = graph.pruned
    metric = getattr(pruned.scorer, "metric", None) if pruned.metric is None else pruned.metric
    tower, added = pruned.tower, pruned.added
    if half:
        tower, added, metric = copy.deepcopy(tower).half(), _half(added), _in_half(metric)
    spec = replace(pruned.spec, select="topk")
    features = []
    for start in range(0, len(image_BHW3), _CHUNK):
        rows = slice(start, start + _CHUNK)
        scorer = _Forced([kept_BK[rows] for kept_BK in kept], pruned.scorer)
        walker = PrunedTower(tower, spec, scorer, added, metric).eval()
        image_BCHW = graph.pixels(image_BHW3[rows])
        features.append(walker(image_BCHW.half() if half else image_BCHW).float())
    return _answers(graph, torch.cat(features))


def _half(module: nn.Module | None) -> nn.Module | None:
    return None if module is None else copy.deepcopy(module).half()


def _in_half(metric):
    """A learned metric keeps float32 weights, as it does in a float16 graph."""
    return None if metric is None else lambda state: metric(replace(state, x_BLC=state.x_BLC.float())).half()
