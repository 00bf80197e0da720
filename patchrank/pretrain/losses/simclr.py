"""View against view: SimCLR's NT-Xent over all processes. Letters: B pictures here, G of all processes, E embedding."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.pretrain.losses.encoded import Encoded
from patchrank.pretrain.losses.gathering import first_row, gather_rows
from patchrank.pretrain.losses.heads import mlp_head


def nt_xent(first_BE: Tensor, second_BE: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent of two views, symmetric in them; scalar, ln(2 G - 1) if all embeddings are equal.

    Args: embeddings (B, E) float of both views, not normalised, row i of both from the same picture.
    Source: SimCLR (Chen et al. 2020, equation 1), gathered with gradient. A-CLIP's released code passes the first view
    twice (its pull request 4); here the views are two arguments and a test holds that both get a gradient.
    """
    first_BE, second_BE = F.normalize(first_BE.float(), dim=-1), F.normalize(second_BE.float(), dim=-1)
    first_GE, second_GE = gather_rows(first_BE), gather_rows(second_BE)
    B, G = len(first_BE), len(first_GE)
    own_B = first_row(B) + torch.arange(B, device=first_BE.device)
    itself_BG = own_B[:, None] == torch.arange(G, device=first_BE.device)

    def direction(here_BE: Tensor, same_GE: Tensor, other_GE: Tensor) -> Tensor:
        to_same_BG = (here_BE @ same_GE.T / temperature).masked_fill(itself_BG, float("-inf"))
        return F.cross_entropy(torch.cat([here_BE @ other_GE.T / temperature, to_same_BG], dim=1), own_B)

    return (direction(first_BE, first_GE, second_GE) + direction(second_BE, second_GE, first_GE)) / 2


class SimclrObjective(nn.Module):
    """NT-Xent of two online views behind an MLP head; scalar float32.

    Args: widths; hidden and out of the head; temperature; views: the two indices. Source: SLIP (Mu et al. 2022) and
    A-CLIP's code: head 4096-4096-256 on the feature before the projection, temperature 0.1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pooled"})

    def __init__(
        self, widths, *, hidden: int = 4096, out: int = 256, temperature: float = 0.1, views: tuple[int, int] = (0, 1)
    ) -> None:
        super().__init__()
        self.head = mlp_head(widths.image, hidden, out, num_hidden=2, bias=True)
        self.temperature = temperature
        self.views = views

    def forward(self, encoded: Encoded) -> Tensor:
        first_BE, second_BE = (self.head(encoded.pooled_VBT[view].float()) for view in self.views)
        return nt_xent(first_BE, second_BE, self.temperature)
