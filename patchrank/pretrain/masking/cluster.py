"""Cluster masking (E-CLIP): a few random anchors drag along the patches that look like them.

Letters: B pictures, N patches, A anchors.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchrank.pretrain.masking.anchors import draw_anchors, num_anchors
from patchrank.pretrain.masking.context import MaskContext
from patchrank.pretrain.masking.similarity import blended_cosine, unit_patches


@dataclass(frozen=True)
class ClusterMasker:
    """score = -(largest cosine to an anchor), anchors lowest; at a fixed K the patches least like any anchor stay.

    With a bounded count per picture and `threshold = -t` this is the paper's rule: whatever has a cosine above t to an
    anchor falls; `patchrank.pretrain.threshold` searches for t, as the code documents.
    Source: E-CLIP (Wei et al. 2024): 3 % anchors, RGB patches; `embedding=True` hands over from pixels to embeddings as
    the run goes on. Deviations from its released code: similarity threshold and mask ratio are two numbers, anchors are
    always masked (also flat patches), the embedding variant runs, of surplus patches those most alike fall.
    """

    share: float = 0.03
    """Anchors among the patches."""
    embedding: bool = False
    """Blend in embeddings with a share that is the progress of the run; False: pixels only."""
    needs: ClassVar[frozenset[str]] = frozenset()

    @torch.no_grad()
    def __call__(self, context: MaskContext) -> Tensor:
        anchor_BA = draw_anchors(context.noise_BN, num_anchors(self.share, context.num_patches))
        unit_BNM = unit_patches(context.image_BCHW, context.patch_size)
        share = min(1.0, max(0.0, context.progress)) if self.embedding else 0.0
        score_BN = -blended_cosine(anchor_BA, unit_BNM, context.token_BNC, share).amax(1)
        return score_BN.scatter(1, anchor_BA, -2.0)


@dataclass(frozen=True)
class EmbeddingClusterMasker(ClusterMasker):
    """`ClusterMasker` with embeddings."""

    embedding: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
