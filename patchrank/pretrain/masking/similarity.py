"""How alike two patches of a picture look: cosine of pixels, of embeddings, or a blend.

Letters: B pictures, C, H, W of a picture, N patches, M features of a patch (one more than its values), Q query patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.tokens import gather_tokens


def unit_patches(image_BCHW: Tensor, patch_size: int) -> Tensor:
    """Patches as rows (B, N, 3 * side^2 + 1) float32, each minus its own mean and scaled to length one.

    Products of such rows are cosines of standardised patches, as the standard deviation cancels. Flat patches
    (deviation below 1e-4) have one direction of their own, the last: they are alike and resemble nothing else.
    Source: E-CLIP (Wei et al. 2024) and PGS. Deviation: there the rounding noise of a flat patch is blown up, and an
    exactly flat one resembles nothing, not even itself, so that an even background stays and the object falls.
    """
    B, C, H, W = image_BCHW.shape
    split = image_BCHW.float().reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    patch_BNM = split.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch_size**2)
    centred_BNM = patch_BNM - patch_BNM.mean(-1, keepdim=True)
    length_BN1 = centred_BNM.norm(dim=-1, keepdim=True)
    is_flat_BN1 = length_BN1 < 1e-4 * (patch_BNM.shape[-1] - 1) ** 0.5
    unit_BNM = centred_BNM * torch.where(is_flat_BN1, 0.0, 1 / length_BN1)
    return torch.cat([unit_BNM, is_flat_BN1.float()], dim=-1)


def blended_cosine(
    index_BQ: Tensor | None, unit_BNM: Tensor | None, token_BNC: Tensor | None, embedding_share: float
) -> Tensor:
    """share * cos(embeddings) + (1 - share) * cos(pixels) of query patches against all: (B, Q, N) float32.

    Args: index (B, Q) int64 of the queries, None: all patches; `unit_patches`; embeddings (B, N, C); share in [0, 1]: 0
    never reads the embeddings, 1 never the pixels. The full N x N matrix is formed only if all are asked for.
    Source: PGS and E-CLIP's `--use_embed`.
    """
    total_BQN = None
    for share, feature_BNM in ((1 - embedding_share, unit_BNM), (embedding_share, token_BNC)):
        if share > 0:
            row_BNM = feature_BNM if feature_BNM is unit_BNM else F.normalize(feature_BNM.float(), dim=-1)
            query_BQM = row_BNM if index_BQ is None else gather_tokens(row_BNM, index_BQ)
            cosine_BQN = share * query_BQM @ row_BNM.mT
            total_BQN = cosine_BQN if total_BQN is None else total_BQN + cosine_BQN
    return total_BQN
