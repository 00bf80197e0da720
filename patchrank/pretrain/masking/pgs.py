"""CLIP-PGS: a few candidates away from edges drag along the patches they resemble; each part is a switch.

Letters: B pictures, N patches, A candidates.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchrank.pretrain.masking.anchors import draw_anchors, num_anchors
from patchrank.pretrain.masking.context import MaskContext
from patchrank.pretrain.masking.keep_set import keep_best
from patchrank.pretrain.masking.similarity import blended_cosine, unit_patches
from patchrank.pretrain.masking.sinkhorn import sinkhorn_plan
from patchrank.pretrain.masking.sobel import edge_map

CANDIDATE_SCORE = -100.0
"""Below every other score: a candidate falls first."""
PROTECTED_SCORE = 100.0
"""Added to a protected patch's edge in [0, 1]: it falls last, weakest edge first where too few others can fall."""


def protected_patches(edge_BN: Tensor, share: float, tie_BN: Tensor | None = None) -> Tensor:
    """The `share` of patches with the most edge, those without any left out: (B, N) bool.

    Args: tie (B, N): noise that decides between equal edges, the higher is taken; None: the lowest index.
    """
    num = int(share * edge_BN.shape[1] + 1e-9)
    among_BN = torch.zeros_like(edge_BN, dtype=torch.bool).scatter(1, keep_best(edge_BN, num, tie_BN), True)
    return among_BN & (edge_BN > 0)


@dataclass(frozen=True)
class PgsMasker:
    """score = -(largest resemblance to a candidate); protected patches above, candidates below all others.

    1. Protected: the `protect` share of patches with the most pixel edge (`sobel.edge_map`).
    2. Candidates: 5 % of the patches, drawn uniformly among the unprotected.
    3. Resemblance S: cosine of standardised pixels, handed over to embeddings as the run goes on.
    4. Optimal transport: Q = S + weight * plan / rowmax(plan), plan = Sinkhorn of exp(S / temperature) without its
       diagonal: what a patch sends to itself is most of its mass, and would leave next to nothing of all other entries.
    5. score_j = -max over candidates c of Q[c, j].
    Candidates are a hint that protection may overrule; a share of protected patches that leaves too few to fall gives
    way, weakest edge first.
    Source: CLIP-PGS (Pei et al. 2025) as its abstract and figures state it. protect, temperature and weight are ours:
    the method section's values are not known, and the released code does none of 1, 2 and 4 (docs of each part).
    """

    edges: bool = True
    """Protect patches with edges."""
    transport: bool = True
    """Add the transport plan to the resemblance."""
    embedding: bool = True
    """Hand over from pixels to embeddings with the progress of the run; False: pixels only."""
    candidates: float = 0.05
    protect: float = 0.3
    temperature: float = 0.1
    num_sweeps: int = 10
    plan_weight: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})

    @torch.no_grad()
    def __call__(self, context: MaskContext) -> Tensor:
        edge_BN = protected_BN = None
        if self.edges:
            edge_BN = edge_map(context.image_BCHW, context.patch_size, context.pixel_std)
            # chance decides between equal edges; patches that chance makes candidates come last
            protected_BN = protected_patches(edge_BN, self.protect, 1 - context.noise_BN)
        candidate_BA = draw_anchors(context.noise_BN, num_anchors(self.candidates, context.num_patches), protected_BN)
        score_BN = -self.resemblance(context, candidate_BA).amax(1)
        score_BN = score_BN.scatter(1, candidate_BA, CANDIDATE_SCORE)
        return score_BN if edge_BN is None else torch.where(protected_BN, PROTECTED_SCORE + edge_BN, score_BN)

    def resemblance(self, context: MaskContext, candidate_BA: Tensor) -> Tensor:
        """Q (B, A, N) of the candidates to all patches; an N x N matrix is formed only for the transport plan."""
        unit_BNM = unit_patches(context.image_BCHW, context.patch_size)
        share = min(1.0, max(0.0, context.progress)) if self.embedding else 0.0
        if not self.transport:
            return blended_cosine(candidate_BA, unit_BNM, context.token_BNC, share)
        similarity_BNN = blended_cosine(None, unit_BNM, context.token_BNC, share)
        plan_BNN = sinkhorn_plan(similarity_BNN, self.temperature, self.num_sweeps)
        plan_BNN.diagonal(dim1=1, dim2=2).zero_()
        largest_BN1 = plan_BNN.amax(-1, keepdim=True).clamp_min(torch.finfo(plan_BNN.dtype).tiny)
        scaled_BNN = similarity_BNN + self.plan_weight * plan_BNN / largest_BN1
        return scaled_BNN.gather(1, candidate_BA[..., None].expand(-1, -1, scaled_BNN.shape[-1]))


@dataclass(frozen=True)
class PixelPgsMasker(PgsMasker):
    """`PgsMasker` that never reads embeddings."""

    embedding: bool = False
    needs: ClassVar[frozenset[str]] = frozenset()
