"""Masked self-distillation: fill in the teacher's view of the patches that the student did not see.

Letters: B pictures, N patches, K seen by the student, C width, Q codewords.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from patchrank.pretrain.distributed import average_
from patchrank.pretrain.losses.decoder import PatchDecoder
from patchrank.pretrain.losses.encoded import Encoded
from patchrank.pretrain.masking.context import MaskContext
from patchrank.pretrain.masking.keep_set import select
from patchrank.pretrain.masking.noise import RandomMasker
from patchrank.tokens import gather_tokens


def masked_cross_entropy(student_BNQ: Tensor, target_BNQ: Tensor, hidden_BN: Tensor) -> Tensor:
    """Mean cross-entropy of soft targets over the places where `hidden_BN` (B, N) bool holds; scalar float32.

    Args: student logits and target probabilities (B, N, Q). What stands at other places has no influence.
    """
    entropy_BN = -(target_BNQ * student_BNQ.float().log_softmax(-1)).sum(-1)
    return (entropy_BN * hidden_BN).sum() / hidden_BN.sum()


class Codebook(nn.Module):
    """Patch tokens (B, N, C) -> logits of Q codewords."""

    def __init__(self, width: int, num_codes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.code = nn.Linear(width, num_codes, bias=False)

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.code(self.norm(x_BNC))


class DistillObjective(nn.Module):
    """The student sees a random share of the patches; a decoder predicts the teacher's soft codewords of the others.

    Args: widths; keep, the share that the student sees; num_codes; num_layers of the decoder; temperature of the
    student and teacher_temperature; centre_momentum, the moving average that keeps codewords in even use.
    Source: MaskCLIP (Dong et al. 2023): 75 % masked, one decoder layer, EMA teacher on the full picture, online
    quantizer to soft codewords, weight 0.05. Its code is not released and we know it second-hand: temperatures and
    centring are those of iBOT (Zhou et al. 2022, section 3), the quantizer's teacher copy is an EMA as well.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tower", "teacher", "teacher patches"})

    def __init__(
        self,
        widths,
        *,
        keep: float = 0.25,
        num_codes: int = 4096,
        num_layers: int = 1,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        centre_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.keep = keep
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.centre_momentum = centre_momentum
        self.decoder = PatchDecoder(widths.image, widths.image_heads, num_layers, widths.num_patches)
        self.followed = Codebook(widths.image, num_codes)
        self.register_buffer("centre_Q", torch.zeros(num_codes))

    @torch.no_grad()
    def targets(self, encoded: Encoded) -> Tensor:
        """The teacher's probabilities (B, N, Q) float32; in train mode the centre moves on (all processes)."""
        logits_BNQ = encoded.teacher_heads["distill"](encoded.teacher.patch_BNC.float()).float()
        target_BNQ = ((logits_BNQ - self.centre_Q) / self.teacher_temperature).softmax(-1)
        if self.training:
            mean_Q = logits_BNQ.mean((0, 1))
            average_([mean_Q])
            self.centre_Q.lerp_(mean_Q, 1 - self.centre_momentum)
        return target_BNQ

    def forward(self, encoded: Encoded) -> Tensor:
        tower = encoded.tower
        num_prefix = tower.config.num_prefix
        x_BLC = tower.embed(encoded.image_BCHW)
        context = MaskContext(
            image_BCHW=encoded.image_BCHW, patch_size=tower.config.patch_size, generator=encoded.generator
        )
        keep_BK = select(RandomMasker()(context), context.grid, self.keep).keep_BK
        seen_BLC = torch.cat([x_BLC[:, :num_prefix], gather_tokens(x_BLC[:, num_prefix:], keep_BK)], dim=1)
        seen_BLC = tower.norm(tower.run(seen_BLC, 0, tower.config.num_layers))
        logits_BNQ = self.followed(self.decoder(seen_BLC, keep_BK, num_prefix)) / self.temperature
        hidden_BN = torch.ones(logits_BNQ.shape[:2], dtype=torch.bool, device=keep_BK.device).scatter(1, keep_BK, False)
        return masked_cross_entropy(logits_BNQ, self.targets(encoded), hidden_BN)
