"""Masked language modelling on the captions alone. Letters: B texts, L tokens, C width, T vocabulary."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.pretrain.losses.decoder import Decoder
from patchrank.pretrain.losses.encoded import Encoded
from patchrank.text import END, PAD, START, VOCABULARY


def choose_tokens(token_BL: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Which tokens to guess, (B, L) bool: each byte with chance `share`; never START, END or PAD."""
    chance_BL = torch.rand(token_BL.shape, generator=generator, device=generator.device).to(token_BL.device)
    return (chance_BL < share) & (token_BL != START) & (token_BL != END) & (token_BL != PAD)


def hide_tokens(token_BL: Tensor, chosen_BL: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the tower reads: of the chosen tokens 80 % are hidden, 10 % become a random byte, 10 % stay.

    Returns: tokens (B, L) int64, and where the hidden ones are (B, L) bool. Source: BERT (Devlin et al. 2019, 3.1).
    """
    lot_BL = torch.rand(token_BL.shape, generator=generator, device=generator.device).to(token_BL.device)
    byte_BL = torch.randint(256, token_BL.shape, generator=generator, device=generator.device).to(token_BL.device)
    return torch.where(chosen_BL & (lot_BL >= 0.8) & (lot_BL < 0.9), byte_BL, token_BL), chosen_BL & (lot_BL < 0.8)


class MlmObjective(nn.Module):
    """Guess masked bytes of the captions behind the text tower and a small decoder; mean over them; scalar float32.

    Args: widths; share of the bytes that are to be guessed; num_layers of the decoder.
    Source: MaskCLIP (Dong et al. 2023): 20 % of the tokens, 4-layer decoder, weight 0.05. Deviations: our tokens are
    bytes; the mask token is this head's, so that the text tower's checkpoint keeps its vocabulary.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text tower"})

    def __init__(self, widths, *, share: float = 0.2, num_layers: int = 4) -> None:
        super().__init__()
        self.share = share
        self.hidden = nn.Parameter(torch.zeros(widths.text))
        self.decoder = Decoder(widths.text, widths.text_heads, num_layers)
        self.guess = nn.Linear(widths.text, VOCABULARY)
        nn.init.normal_(self.hidden, std=0.02)

    def forward(self, encoded: Encoded) -> Tensor:
        text, token_BL = encoded.text_tower, encoded.token_BL
        chosen_BL = choose_tokens(token_BL, self.share, encoded.generator)
        read_BL, hidden_BL = hide_tokens(token_BL, chosen_BL, encoded.generator)
        x_BLC = torch.where(hidden_BL[..., None], self.hidden.to(text.token.weight.dtype), text.token(read_BL))
        x_BLC = x_BLC + text.position[: token_BL.shape[1]]
        bias_B11L = x_BLC.new_zeros(token_BL.shape).masked_fill(token_BL == PAD, float("-inf"))[:, None, None]
        for block in text.blocks:
            x_BLC = block(x_BLC, bias_B11L)
        logits_BLT = self.guess(self.decoder(text.norm(x_BLC), bias_B11L))
        loss_BL = F.cross_entropy(logits_BLT.float().transpose(1, 2), token_BL, reduction="none")
        return (loss_BL * chosen_BL).sum() / chosen_BL.sum().clamp_min(1)
