"""Maskers that need nothing but the picture: pure chance, and contrast with some chance. Letters: B, C, H, W, N."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.pretrain.masking.context import MaskContext


@dataclass(frozen=True)
class RandomMasker:
    """Every set of K units is as likely as any other. Source: FLIP (Li et al. 2023, section 3)."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, context: MaskContext) -> Tensor:
        return context.noise_BN


@dataclass(frozen=True)
class ContrastMasker:
    """Patches whose pixels differ most, with some chance: log standard deviation plus normal noise.

    Ours: it spares flat background in the cheap part of a run; the noise lets every patch be seen now and then.
    """

    noise: float = 0.3
    """Standard deviation of the noise."""
    needs: ClassVar[frozenset[str]] = frozenset()

    @torch.no_grad()
    def __call__(self, context: MaskContext) -> Tensor:
        image_BCHW, side = context.image_BCHW, context.patch_size
        variance_BCHW = F.avg_pool2d(image_BCHW.square(), side) - F.avg_pool2d(image_BCHW, side).square()
        score_BN = variance_BCHW.mean(1).clamp_min(1e-6).log().flatten(1) / 2
        return score_BN + self.noise * context.draw(torch.randn)
