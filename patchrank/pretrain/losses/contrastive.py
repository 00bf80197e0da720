"""Picture against text: CLIP's loss and SigLIP's, over all processes, with one or several true captions a picture.

Letters: B pictures here, G pictures of all processes, M captions of a picture, V views, D feature.
"""

import hashlib
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.pretrain.losses.encoded import Encoded
from patchrank.pretrain.losses.gathering import first_row, gather_rows, own_rows_in


def caption_ids(captions: Sequence[Sequence[str]], drawn: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids (B, M) int64 of all captions of each picture, filled up with -1, and of the drawn ones (B,).

    The id is a hash of the text (63 bits, not negative), so that processes agree without talking.
    """
    num_columns = max(len(own) for own in captions)
    caption_BM = torch.full((len(captions), num_columns), -1, dtype=torch.int64)
    for row, own in enumerate(captions):
        caption_BM[row, : len(own)] = torch.tensor([_id(text) for text in own])
    return caption_BM, torch.tensor([_id(text) for text in drawn])


def _id(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def positives_of(encoded: Encoded) -> tuple[Tensor, Tensor]:
    """True pairs of this process's rows: (picture, any text) (B, G) and (text, any picture) (B, G), both bool."""
    B = encoded.text_BD.shape[0]
    own_G = first_row(B) + torch.arange(B, device=encoded.text_BD.device)
    if encoded.caption_BM is None:
        G = gather_rows(own_G, False).shape[0]
        diagonal_BG = own_G[:, None] == torch.arange(G, device=own_G.device)
        return diagonal_BG, diagonal_BG
    drawn_G = gather_rows(encoded.drawn_B, False)
    caption_GM = gather_rows(_same_width(encoded.caption_BM), False)
    to_text_BG = (encoded.caption_BM[:, :, None] == drawn_G).any(1)
    to_image_BG = (encoded.drawn_B[:, None, None] == caption_GM).any(2)
    return to_text_BG, to_image_BG


def _same_width(caption_BM: Tensor) -> Tensor:
    """Fill up with -1 to the largest M of all processes, as only equal shapes can be gathered."""
    widest = int(gather_rows(torch.tensor([caption_BM.shape[1]], device=caption_BM.device), False).max())
    return F.pad(caption_BM, (0, widest - caption_BM.shape[1]), value=-1)


def _direction(logits_BG: Tensor, positive_BG: Tensor) -> Tensor:
    """Mean over rows of the cross-entropy against equal shares of all positives."""
    log_share_BG = logits_BG.log_softmax(1)
    return -((log_share_BG * positive_BG).sum(1) / positive_BG.sum(1)).mean()


class ClipContrastive(nn.Module):
    """Symmetric InfoNCE of each view with the texts, mean over views; scalar float32.

    With one true caption each this is CLIP's loss. Each process computes its own rows against all columns; the mean
    over processes is the loss of the joined batch.
    Args: widths unused; views: indices of the views that meet the text, None: all; gather_grad as in `gather_rows`.
    Source: CLIP (Radford et al. 2021, figure 3); two views at a half each as A-CLIP; several positives as UniCL (Yang
    et al. 2022, equations 2-4), given by the captions, not by class labels.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, widths=None, *, views: tuple[int, ...] | None = None, gather_grad: bool = True) -> None:
        super().__init__()
        self.views = views
        self.gather_grad = gather_grad

    def forward(self, encoded: Encoded) -> Tensor:
        to_text_BG, to_image_BG = positives_of(encoded)
        text_BD = F.normalize(encoded.text_BD.float(), dim=-1)
        text_GD = gather_rows(text_BD, self.gather_grad)
        views = range(len(encoded.feature_VBD)) if self.views is None else self.views
        losses = []
        for view in views:
            image_BD = F.normalize(encoded.feature_VBD[view].float(), dim=-1)
            image_GD = gather_rows(image_BD, self.gather_grad)
            losses.append(_direction(encoded.scale * image_BD @ text_GD.T, to_text_BG) / 2)
            losses.append(_direction(encoded.scale * text_BD @ image_GD.T, to_image_BG) / 2)
        return torch.stack(losses).sum() / len(views)


class SiglipContrastive(nn.Module):
    """Every pair of a picture and a text is judged alone: -log sigmoid(+-(scale * cosine + bias)); scalar float32.

    Summed over all texts, mean over pictures and views.
    Source: SigLIP (Zhai et al. 2023, algorithm 1): learned bias, start -10. Deviations: the scale is the pair's own (it
    starts at 1 / 0.07 instead of 10); a text that is true for several pictures is a positive of each.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, widths=None, *, views: tuple[int, ...] | None = None, gather_grad: bool = True) -> None:
        super().__init__()
        self.views = views
        self.gather_grad = gather_grad
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, encoded: Encoded) -> Tensor:
        positive_BG, _ = positives_of(encoded)
        sign_BG = torch.where(positive_BG, 1.0, -1.0)
        text_BD = F.normalize(encoded.text_BD.float(), dim=-1)
        text_GD = own_rows_in(gather_rows(text_BD, self.gather_grad), text_BD)
        views = range(len(encoded.feature_VBD)) if self.views is None else self.views
        losses = []
        for view in views:
            image_BD = F.normalize(encoded.feature_VBD[view].float(), dim=-1)
            logits_BG = encoded.scale * image_BD @ text_GD.T + self.bias
            losses.append(-F.logsigmoid(sign_BG * logits_BG).sum(1).mean())
        return torch.stack(losses).mean()
