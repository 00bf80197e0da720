"""What a ranking is worth: the feature of one image when only the first K patches of an order stay.

Letters: S orders side by side, N patches, K kept, D feature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.scorers import SCORERS
from patchrank.search.variants import Variants
from patchrank.tokens import rank


def features_along(variants: Variants, order_SN: Tensor, counts: list[int]) -> Tensor:
    """Features (S, len(counts), D) of one image when each order (S, N) int64, best first, keeps its first K."""
    parts = []
    for K in counts:
        mask_SN = torch.zeros(order_SN.shape, dtype=torch.bool, device=order_SN.device)
        parts.append(variants.features(mask_SN.scatter_(1, order_SN[:, :K], True)))
    return torch.stack(parts, dim=1)


def preserved(feature_SKD: Tensor, dense_D: Tensor) -> Tensor:
    """Cosine (S, K) float32 of pruned features to the unpruned one."""
    return F.cosine_similarity(feature_SKD.float(), dense_D.float(), dim=-1)


def free_order(variants: Variants, scorer: str, seed: int) -> Tensor:
    """Order (N,) int64 of a scorer of `patchrank.scorers.SCORERS` on this image."""
    state = variants.state
    return rank(SCORERS[scorer](state.grid, seed)(state))[0]
