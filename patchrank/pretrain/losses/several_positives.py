"""The contrastive objective when one caption is true for several pictures of a batch.

Ten digit classes and a few templates give captions that repeat inside every batch, and "a photo of the digit seven"
is true for every seven, whichever caption was drawn for it. Plain InfoNCE would call those pairs negatives. Here a
text is a positive of a picture if it is one of that picture's captions; equal texts are encoded once and counted.

Letters: B pictures, U distinct texts, D feature.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def distinct(texts: Sequence[str]) -> tuple[list[str], Tensor]:
    """Texts in the order of their first appearance, each once, and how often each stood there (U,) float32."""
    count = Counter(texts)
    return list(count), torch.tensor(list(count.values()), dtype=torch.float32)


def positives(captions: Sequence[Sequence[str]], texts: Sequence[str]) -> Tensor:
    """positive (B, U) bool: text u is one of the captions of picture b. `texts` are distinct."""
    column = {text: number for number, text in enumerate(texts)}
    positive_BU = torch.zeros(len(captions), len(texts), dtype=torch.bool)
    for row, own in enumerate(captions):
        positive_BU[row, [column[text] for text in own if text in column]] = True
    return positive_BU


def contrastive_loss(image_BD: Tensor, text_UD: Tensor, positive_BU: Tensor, count_U: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE with several positives: mean of picture -> texts and text -> pictures; float scalar.

    Each direction is the cross-entropy of softmax(scale * cosine) against equal shares for all positives of a row
    (or column); a text that was drawn n times counts as n columns. With one positive each this is CLIP's loss.
    Args: unit rows image (B, D) and text (U, D) float32; positive (B, U) bool, at least one in every row and column;
    count (U,) float32 >= 1; scale, the factor itself, scalar.
    Source: CLIP (Radford et al. 2021, figure 3); several positives as UniCL (Yang et al. 2022, equations 2-4) and
    SupCon "out" (Khosla et al. 2020, equation 2). Deviation: positives are given by the captions, not by class labels.
    """
    logits_BU = scale * image_BD @ text_UD.T
    weight_BU = positive_BU * count_U
    log_share_BU = logits_BU - (logits_BU + count_U.log()).logsumexp(1, keepdim=True)
    to_text_B = -(log_share_BU * weight_BU).sum(1) / weight_BU.sum(1)
    to_image_U = -(logits_BU.log_softmax(0) * positive_BU).sum(0) / positive_BU.sum(0)
    return (to_text_B.mean() + (to_image_U * count_U).sum() / count_U.sum()) / 2
