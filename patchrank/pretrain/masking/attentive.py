"""Maskers that ask the EMA teacher: what its class token looks at, or what resembles the caption.

Letters: B pictures, S blocks of the teacher, N patches or units, D feature.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.pretrain.boxes import map_scores
from patchrank.pretrain.masking.context import MaskContext
from patchrank.pretrain.masking.keep_set import unit_scores

STRATEGIES = ("low", "high", "mixed")


def to_view(score_BN: Tensor, context: MaskContext) -> Tensor:
    """The teacher's map (B, N of its grid) as this view's map: (B, N) of patches, or of units.

    Units where the teacher's cells are no finer than they are (half resolution: one cell is one block of 2 x 2
    patches), so that a view with the teacher's own box gets the map as it is.
    """
    teacher = context.teacher
    fine = teacher.grid[0] > context.unit_grid[0] or teacher.grid[1] > context.unit_grid[1]
    out_grid = context.grid if fine else context.unit_grid
    whole_B4 = score_BN.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(len(score_BN), -1)
    same = context.box_B4 is None or teacher.box_B4 is None
    from_B4, to_B4 = (whole_B4, whole_B4) if same else (teacher.box_B4, context.box_B4)
    return map_scores(score_BN, teacher.grid, from_B4, to_B4, out_grid)


def arrange(score_BU: Tensor, strategy: str, context: MaskContext, random_share: float) -> Tensor:
    """Which half falls: "low" drops the lowest scores, "high" the highest, "mixed" keeps a random share.

    Under "mixed" the patches that chance favours (`random_share` of the picture) stand between the others: with
    keep 0.5 and a share s, the best (0.5 - s/2) stay, the worst (0.5 - s/2) fall, and chance decides for the middle.
    Returns: scores (B, U), or ranks where the strategy is "mixed".
    """
    if strategy == "low":
        return score_BU
    if strategy == "high":
        return -score_BU
    if strategy != "mixed":
        raise ValueError(f"strategy={strategy!r}: unknown; choose one of {', '.join(STRATEGIES)}")
    num, noise_BU = score_BU.shape[1], unit_scores(context.noise_BN, context.grid, context.block)
    noise_BU = noise_BU.argsort(dim=1).argsort(dim=1) / num
    rank_BU = score_BU.argsort(dim=1, stable=True).argsort(dim=1).float() / max(1, num - 1)
    middle_BU = (rank_BU - 0.5).abs() <= random_share / 2
    return torch.where(middle_BU, 0.5 + random_share * (noise_BU - 0.5) / 2, rank_BU)


@dataclass(frozen=True)
class AttentiveMasker:
    """Attention of the teacher's class token to a patch, mean over all blocks and heads; the caption plays no part.

    Source: A-CLIP (Yang et al. 2023): "low" keeps the most attended half, "high" (as AttMask) the least attended;
    "mixed" is named there without a rule, so its rule is ours (`arrange`). The class column is dropped and nothing is
    normalised again. Deviation: the map is cut to the view by one bilinear read instead of resize, crop, resize.
    """

    strategy: str = "low"
    random_share: float = 0.5
    """Under "mixed": share of the units for which chance decides."""
    num_blocks: int | None = None
    """Only the last blocks count; None: all, as in the paper."""
    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})

    @torch.no_grad()
    def __call__(self, context: MaskContext) -> Tensor:
        rows_BSN = context.teacher.attention_BSN
        rows_BSN = rows_BSN if self.num_blocks is None else rows_BSN[:, -self.num_blocks :]
        score_BU = unit_scores(to_view(rows_BSN.mean(1), context), context.grid, context.block)
        return arrange(score_BU, self.strategy, context, self.random_share)


@dataclass(frozen=True)
class TextMasker:
    """Cosine of the teacher's patch feature to the caption's: A-CLIP as its abstract reads, for an ablation.

    Patch features are the tokens behind the last block through the final norm and the projection.
    Source: the abstract ("semantic correlation to the text"); the paper's method takes the class token's attention as
    a proxy, since a choice by the text would leak information to the contrastive loss.
    """

    strategy: str = "low"
    random_share: float = 0.5
    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "teacher patches", "text"})

    @torch.no_grad()
    def __call__(self, context: MaskContext) -> Tensor:
        patch_BND = F.normalize(context.teacher.patch_feature_BND.float(), dim=-1)
        score_BN = torch.einsum("bnd,bd->bn", patch_BND, F.normalize(context.text_BD.float(), dim=-1))
        score_BU = unit_scores(to_view(score_BN, context), context.grid, context.block)
        return arrange(score_BU, self.strategy, context, self.random_share)
