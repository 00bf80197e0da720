"""Features -> class logits: the zero-shot classifier of a CLIP, or the rows of a classifier's own head."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from patchrank.loading import LoadedClip, class_matrix

Classifier = Callable[[Tensor], Tensor]
"""Feature (B, D) float -> logits (B, Y) float32, scaled as the model's softmax expects."""


def classifier(clip: LoadedClip, dataset) -> Classifier | None:
    """Classifier of a model on a data set's class names; None where the data set has no classes.

    A zero-shot classifier compares normalised features; a head reads them as they are.
    """
    if not dataset.class_names:
        return None
    weight_DY, bias_Y = class_matrix(clip, dataset)
    weight_DY = weight_DY.to(next(clip.tower.parameters()).device)
    if clip.class_head is not None:
        return lambda feature_BD: feature_BD.float() @ weight_DY + bias_Y
    scale = clip.text.logit_scale
    return lambda feature_BD: scale * (F.normalize(feature_BD.float(), dim=-1) @ weight_DY)
