"""Our own small text tower: bytes in, one feature out; trained beside our own image towers (`patchrank.pretrain`).

Bytes need no vocabulary file, so a checkpoint of a few MB is all there is; with `num_merges` the tokens are pieces of
words (`patchrank.word_pieces`). Attention is not causal; padding is masked.

Letters: B texts, L tokens, C width, D feature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.linear import Linear
from patchrank.tower import Block, TowerConfig
from patchrank.word_pieces import num_pieces, word_pieces

START, END, PAD = 256, 257, 258
"""Token ids after the 256 bytes."""
VOCABULARY = 259
"""Ids without pieces of words; those follow."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Everything that distinguishes one text tower from another."""

    context: int = 64
    """L: tokens of every text, start and end included; longer texts are cut."""
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_width: int = 512
    activation: str = "gelu"
    norm_eps: float = 1e-5
    output_dim: int = 128
    num_merges: int = 0
    """Tokens are pieces of words, made by so many merges; 0: bytes."""
    pool: str = "end"
    """What the feature is made of: the output at the "end", or the "mean" over all tokens (few captions teach it)."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids. Raises: UserError for more merges than there are."""
        return VOCABULARY + (num_pieces(self.num_merges) if self.num_merges else 0)


def tokenize(texts: list[str], context: int, num_merges: int = 0) -> Tensor:
    """UTF-8 bytes, or pieces of words, between START and END, then PAD: (B, context) int64; long texts lose their end.

    Raises: UserError for a context below 3 or no texts.
    """
    if context < 3:
        raise UserError(f"context={context}: must be at least 3 (start, one byte, end); give a larger context")
    if not texts:
        raise UserError("texts=[]: must hold at least one text; give a caption or a class name")
    rows = []
    for text in texts:
        own = [VOCABULARY + piece for piece in word_pieces(text, num_merges)] if num_merges else text.encode()
        tokens = [START, *own[: context - 2], END]
        rows.append(tokens + [PAD] * (context - len(tokens)))
    return torch.tensor(rows, dtype=torch.int64)


def _block_config(config: TextConfig) -> TowerConfig:
    return TowerConfig(
        image_size=(1, 1),
        patch_size=1,
        width=config.width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        mlp_width=config.mlp_width,
        activation=config.activation,
        norm_eps=config.norm_eps,
    )


class TextTower(nn.Module):
    """token (B, L) int64 -> feature (B, D) float, not normalised: the output at END after the last norm, projected.

    Raises: UserError for an unknown pool, or more merges than there are.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        if config.pool not in ("end", "mean"):
            raise UserError(f"pool {config.pool!r}: unknown; choose end or mean")
        self.config = config
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Parameter(torch.zeros(config.context, config.width))
        self.blocks = nn.ModuleList(Block(_block_config(config)) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.proj = Linear(config.width, config.output_dim, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Tokens (B, context) int64 of texts, on the CPU."""
        return tokenize(texts, self.config.context, self.config.num_merges)

    def forward(self, token_BL: Tensor) -> Tensor:
        """Tokens from `tokenize`; every row must hold END."""
        x_BLC = self.token(token_BL) + self.position[: token_BL.shape[1]]
        bias_B11L = x_BLC.new_zeros(token_BL.shape).masked_fill(token_BL == PAD, float("-inf"))[:, None, None]
        for block in self.blocks:
            x_BLC = block(x_BLC, bias_B11L)
        if self.config.pool == "mean":
            return self.proj(self.mean(x_BLC, token_BL))
        end_B = (token_BL == END).int().argmax(1)
        return self.proj(self.norm(x_BLC[torch.arange(len(x_BLC), device=x_BLC.device), end_B]))

    def mean(self, x_BLC: Tensor, token_BL: Tensor) -> Tensor:
        """Mean (B, C) of the outputs after the last norm, padding left out."""
        seen_BL1 = (token_BL != PAD).to(x_BLC.dtype)[..., None]
        return (self.norm(x_BLC) * seen_BL1).sum(1) / seen_BL1.sum(1)
