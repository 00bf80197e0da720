"""What an image tower sees of a picture in training: a masker scores patches at layer 0, the best K stay.

The same score -> keep -> gather as everywhere else; K indices stand in ascending order. Letters: B, C, H, W of a
picture, N patches, K kept, L = P + N tokens (P prefix).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.tokens import gather_tokens, keep_top, num_keep
from patchrank.tower import VisionTower

Masker = Callable[[Tensor, int, torch.Generator], Tensor]
"""(picture (B, 3, H, W), patch size in pixels, CPU generator) -> score (B, N) float32, higher = keep."""


def random_scores(image_BCHW: Tensor, patch_size: int, generator: torch.Generator) -> Tensor:
    """Every set of K patches is as likely as any other. Source: FLIP (Li et al. 2023, section 3)."""
    num_patches = (image_BCHW.shape[2] // patch_size) * (image_BCHW.shape[3] // patch_size)
    return torch.rand(len(image_BCHW), num_patches, generator=generator).to(image_BCHW.device)


def contrast_scores(image_BCHW: Tensor, patch_size: int, generator: torch.Generator) -> Tensor:
    """Patches whose pixels differ most, with some chance: log standard deviation plus normal noise of 0.3.

    Ours: it spares flat background in the cheap part of a run; the noise lets every patch be seen now and then.
    """
    variance_BCHW = F.avg_pool2d(image_BCHW.square(), patch_size) - F.avg_pool2d(image_BCHW, patch_size).square()
    score_BN = variance_BCHW.mean(1).clamp_min(1e-6).log().flatten(1) / 2
    return score_BN + 0.3 * torch.randn(score_BN.shape, generator=generator).to(score_BN.device)


MASKERS: dict[str, Masker] = {"random": random_scores, "contrast": contrast_scores}


def encode(tower: VisionTower, image_BCHW: Tensor, masker: str, keep: float, generator: torch.Generator) -> Tensor:
    """Feature (B, D) float, not normalised, of what `MASKERS[masker]` leaves of each picture; keep 1 masks nothing."""
    x_BLC = tower.embed(image_BCHW)
    if keep < 1.0:
        num_prefix = tower.config.num_prefix
        score_BN = MASKERS[masker](image_BCHW, tower.config.patch_size, generator)
        index_BK = keep_top(score_BN, num_keep(keep, score_BN.shape[1])).sort(dim=1).values
        x_BLC = torch.cat([x_BLC[:, :num_prefix], gather_tokens(x_BLC[:, num_prefix:], index_BK)], dim=1)
    return tower.finish(x_BLC, 0)
