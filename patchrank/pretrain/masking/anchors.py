"""Drawing a few patches of each picture at random. Letters: B pictures, N patches, A anchors."""

import torch
from torch import Tensor

from patchrank.tokens import keep_top


def num_anchors(share: float, num_patches: int) -> int:
    """Anchors of N patches, at least one: N - floor(N (1 - share)); 6 and 10 of 196 for 0.03 and 0.05.

    Source: E-CLIP and PGS keep int(N (1 - share)) patches and take the others.
    """
    return max(1, num_patches - int(num_patches * (1 - share) + 1e-9))


def draw_anchors(noise_BN: Tensor, num: int, barred_BN: Tensor | None = None) -> Tensor:
    """Indices (B, A) int64 of the largest noise (B, N) in [0, 1) among patches that are not barred (B, N) bool.

    Barred patches are taken only where a picture has no others.
    """
    return keep_top(noise_BN if barred_BN is None else torch.where(barred_BN, noise_BN - 1, noise_BN), num)
