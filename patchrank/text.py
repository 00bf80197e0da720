"""Our own small text tower: bytes in, one feature out; trained beside our own image towers (`patchrank.pretrain`).

Bytes need no vocabulary file, so a checkpoint of a few MB is all there is. Attention is not causal; padding is masked.

Letters: B texts, L tokens, C width, D feature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.linear import Linear
from patchrank.tower import Block, TowerConfig

START, END, PAD = 256, 257, 258
"""Token ids after the 256 bytes."""
VOCABULARY = 259


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


def tokenize(texts: list[str], context: int) -> Tensor:
    """UTF-8 bytes between START and END, then PAD: (B, context) int64; a long text loses its last bytes.

    Raises: UserError for a context below 3 or no texts.
    """
    if context < 3:
        raise UserError(f"context={context}: must be at least 3 (start, one byte, end); give a larger context")
    if not texts:
        raise UserError("texts=[]: must hold at least one text; give a caption or a class name")
    rows = []
    for text in texts:
        tokens = [START, *text.encode()[: context - 2], END]
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
    """token (B, L) int64 -> feature (B, D) float, not normalised: the output at END after the last norm, projected."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(VOCABULARY, config.width)
        self.position = nn.Parameter(torch.zeros(config.context, config.width))
        self.blocks = nn.ModuleList(Block(_block_config(config)) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.proj = Linear(config.width, config.output_dim, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)

    def forward(self, token_BL: Tensor) -> Tensor:
        """Tokens from `tokenize`; every row must hold END."""
        x_BLC = self.token(token_BL) + self.position[: token_BL.shape[1]]
        bias_B11L = x_BLC.new_zeros(token_BL.shape).masked_fill(token_BL == PAD, float("-inf"))[:, None, None]
        for block in self.blocks:
            x_BLC = block(x_BLC, bias_B11L)
        end_B = (token_BL == END).int().argmax(1)
        return self.proj(self.norm(x_BLC[torch.arange(len(x_BLC), device=x_BLC.device), end_B]))
