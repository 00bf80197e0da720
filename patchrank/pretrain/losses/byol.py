"""Online view against the EMA teacher: BYOL's prediction. Letters: V views, B pictures, E embedding."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.pretrain.losses.encoded import Encoded
from patchrank.pretrain.losses.heads import mlp_head


def prediction_loss(predicted_BE: Tensor, target_BE: Tensor) -> Tensor:
    """Mean of 2 - 2 cos(predicted, target): in [0, 4], 0 only where they are aligned; no gradient to the target."""
    return 2 - 2 * F.cosine_similarity(predicted_BE.float(), target_BE.detach().float(), dim=-1).mean()


class ByolObjective(nn.Module):
    """Each online view predicts the teacher's embedding of the picture; mean over views and pictures; scalar float32.

    The teacher keeps an EMA of `followed`, the projector, in train mode with batch statistics of its own batches.
    Source: BYOL (Grill et al. 2020, equation 2) from online view to teacher as A-CLIP (projector 4096-256, predictor
    4096-256); its weight 2 is the recipe's. Deviation: each view has its own batch statistics in the heads.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pooled", "teacher"})

    def __init__(self, widths, *, hidden: int = 4096, out: int = 256, views: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.followed = mlp_head(widths.image, hidden, out)
        self.predictor = mlp_head(out, hidden, out)
        self.views = views

    def forward(self, encoded: Encoded) -> Tensor:
        with torch.no_grad():
            target_BE = encoded.teacher_heads["byol"](encoded.teacher.pooled_BC.float())
        losses = []
        for view in self.views:
            predicted_BE = self.predictor(self.followed(encoded.pooled_VBT[view].float()))
            losses.append(prediction_loss(predicted_BE, target_BE))
        return torch.stack(losses).mean()
