"""What an image tower sees of a picture in training: a masker scores patches at layer 0, the best K stay.

The same score -> keep -> gather (-> fold) as everywhere else; K indices stand in ascending order. MASKERS names every
masker; `mask` turns a `MaskSpec` and a `MaskContext` into a `Selection`; `encode_masked` runs the tower on it.

Letters: B, C, H, W of a picture, N patches, K kept, L = P + N tokens (P prefix), T width before the projection.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchrank.errors import UserError
from patchrank.pretrain.masking.attentive import AttentiveMasker, TextMasker
from patchrank.pretrain.masking.cluster import ClusterMasker, EmbeddingClusterMasker
from patchrank.pretrain.masking.context import MaskContext, Masker, Selection
from patchrank.pretrain.masking.keep_set import select, select_bounded
from patchrank.pretrain.masking.noise import ContrastMasker, RandomMasker
from patchrank.pretrain.masking.pgs import PgsMasker, PixelPgsMasker
from patchrank.pruned import apply_cut, fold_metric, size_with_prefix, start_state
from patchrank.spec import RESTS, PruneSpec
from patchrank.tokens import num_keep
from patchrank.tower import VisionTower

__all__ = ["MASKERS", "MaskContext", "MaskSpec", "Masker", "Selection", "encode", "encode_masked", "mask"]

MASKERS: dict[str, Masker] = {
    "random": RandomMasker(),
    "contrast": ContrastMasker(),
    "attentive": AttentiveMasker(),
    "attentive-high": AttentiveMasker(strategy="high"),
    "attentive-mixed": AttentiveMasker(strategy="mixed"),
    "text": TextMasker(),
    "cluster": ClusterMasker(),
    "cluster-embedding": EmbeddingClusterMasker(),
    "pgs": PgsMasker(),
    "pgs-no-edges": PgsMasker(edges=False),
    "pgs-no-transport": PgsMasker(transport=False),
    "pgs-pixels": PixelPgsMasker(),
}
"""Name -> masker: (MaskContext) -> score (B, N) of patches or (B, U) of units, float32, higher = keep."""


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """Which patches a view keeps, as plain data; keep 1 masks nothing.

    Raises: UserError for a value outside its rule.
    """

    masker: str = "random"
    """A row of MASKERS."""
    keep: float = 1.0
    """Share in (0, 1] of the selection units that stay; with `least`, the largest share."""
    block: int = 1
    """Side of a selection unit in patches: 2 is A-CLIP's 32-pixel block at patch 16."""
    rest: str = "drop"
    """"drop" the other patches, or "fold" each into the nearest kept one."""
    least: float | None = None
    """Smallest share that stays, for a count per picture; None: the same count for all."""
    threshold: float = 0.0
    """With `least`: patches that score above this stay, within the bounds."""
    mean_keep: float | None = None
    """With `least`: the share that shall stay on average; its threshold is still to be searched for, then this is None
    (`patchrank.pretrain.threshold`)."""

    def __post_init__(self) -> None:
        rules = (
            ("masker", self.masker in MASKERS, f"unknown; choose one of {', '.join(MASKERS)}"),
            ("keep", 0 < self.keep <= 1, "must lie in (0, 1]; 0.5 keeps half of the patches"),
            ("block", self.block >= 1, "must be 1 (patches) or more"),
            ("rest", self.rest in RESTS, f"unknown; choose one of {', '.join(RESTS)}"),
            ("least", self.least is None or 0 < self.least <= self.keep, f"must lie in (0, keep={self.keep:g}]"),
            ("least", self.least is None or self.block == 1, "counts patches; use it with block=1"),
            ("least", self.least is None or self.rest == "drop", "drops the rest; a fold needs one count for all"),
            ("mean_keep", self.mean_keep is None or (self.least or 1.0) <= self.mean_keep <= self.keep,
             "must lie between least and keep"),
        )  # fmt: skip
        for name, holds, rule in rules:
            if not holds:
                raise UserError(f"{name}={getattr(self, name)}: {rule}")

    def num_kept(self, grid: tuple[int, int]) -> int:
        """Patches that enter block 0 of a tower with this grid (padding included)."""
        return self.block**2 * num_keep(self.keep, (grid[0] // self.block) * (grid[1] // self.block))


@torch.no_grad()
def mask(spec: MaskSpec, context: MaskContext) -> Selection | None:
    """The patches that one view of a batch keeps; None where it keeps all. Scores are float32, also under autocast.

    Raises: ValueError for a spec whose threshold is still to be searched for.
    """
    if spec.mean_keep is not None:
        raise ValueError(f"mean_keep={spec.mean_keep}: has no threshold yet")
    if spec.keep >= 1.0 and spec.least is None:
        return None
    with torch.autocast(context.image_BCHW.device.type, enabled=False):
        score_BN = MASKERS[spec.masker](context)
        if spec.least is not None:
            return select_bounded(score_BN, spec.least, spec.keep, spec.threshold, tie_BN=context.noise_BN)
        return select(score_BN, context.grid, spec.keep, block=spec.block, tie_BN=context.noise_BN)


def encode_masked(tower: VisionTower, x_BLC: Tensor, selection: Selection | None, rest: str = "drop") -> Tensor:
    """Feature before the projection (B, T) of what a selection leaves; `tower.proj` makes the feature of it.

    Args: tokens (B, P + N, C) from `tower.embed`, positions added; selection None: all of them; rest "drop" or "fold"
    (nearest by the keys of block 0, found without a graph; the average has one).
    A padded entry stands for zero patches: it is blocked as a key and counts nothing in a mean.
    """
    if selection is None:
        return tower.finish_pooled(x_BLC, 0)
    keep_BK, state = selection.keep_BK, start_state(tower, x_BLC, 0)
    order_BN, metric_BNM = keep_BK, None
    if rest == "fold":
        order_BN = _with_rest(keep_BK, x_BLC.shape[1] - state.num_prefix)
        with torch.no_grad():
            metric_BNM = fold_metric(state)
    spec = PruneSpec(cuts=((0, 1.0),), rest=rest)
    state, _ = apply_cut(state, order_BN, keep_BK.shape[1], spec, metric_BNM)
    size_BL = size_with_prefix(state)
    if selection.valid_BK is not None:
        real_BL = torch.cat([selection.valid_BK.new_ones(len(keep_BK), state.num_prefix), selection.valid_BK], dim=1)
        size_BL = real_BL.to(x_BLC.dtype) if size_BL is None else size_BL * real_BL
    return tower.finish_pooled(state.x_BLC, 0, size_BL, state.num_prefix)


def _with_rest(keep_BK: Tensor, num_patches: int) -> Tensor:
    """Order (B, N): the kept patches, then all others ascending."""
    place_BN = torch.full((len(keep_BK), num_patches), num_patches, device=keep_BK.device)
    place_BN.scatter_(1, keep_BK, torch.arange(keep_BK.shape[1], device=keep_BK.device).expand_as(keep_BK))
    return place_BN.argsort(dim=1, stable=True)


def encode(tower: VisionTower, image_BCHW: Tensor, masker: str, keep: float, generator: torch.Generator) -> Tensor:
    """Feature (B, D) float, not normalised, of what a masker that needs only the picture leaves of it."""
    context = MaskContext(image_BCHW=image_BCHW, patch_size=tower.config.patch_size, generator=generator)
    selection = mask(MaskSpec(masker=masker, keep=keep), context)
    return tower.proj(encode_masked(tower, tower.embed(image_BCHW), selection))
