"""A small transformer behind a tower that fills in what was masked. Letters: B, N places, K given, C width."""

import torch
from torch import Tensor, nn

from patchrank.tower import Block, TowerConfig


def decoder_config(width: int, num_heads: int, num_layers: int) -> TowerConfig:
    """Blocks of a decoder; picture and patch sizes mean nothing here."""
    return TowerConfig(
        image_size=(1, 1),
        patch_size=1,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_width=4 * width,
    )


class Decoder(nn.Module):
    """Tokens (B, L, C) -> tokens (B, L, C) after `num_layers` blocks and a norm."""

    def __init__(self, width: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        config = decoder_config(width, num_heads, num_layers)
        self.blocks = nn.ModuleList(Block(config) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BLC: Tensor, bias_B11L: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x_BLC = block(x_BLC, bias_B11L)
        return self.norm(x_BLC)


class PatchDecoder(nn.Module):
    """Puts a learned token where a patch is missing and lets a decoder fill it in.

    Args: width, num_heads, num_layers of the blocks; num_patches N of the full grid.
    """

    def __init__(self, width: int, num_heads: int, num_layers: int, num_patches: int) -> None:
        super().__init__()
        self.missing = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.zeros(num_patches, width))
        self.decoder = Decoder(width, num_heads, num_layers)
        nn.init.normal_(self.missing, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, x_BLC: Tensor, keep_BK: Tensor, num_prefix: int) -> Tensor:
        """Tokens (B, P + K, C) of the patches `keep_BK` (B, K) int64 -> tokens of all N patches (B, N, C)."""
        N, C = self.position.shape
        index_BKC = keep_BK[..., None].expand(-1, -1, C)
        full_BNC = self.missing.to(x_BLC.dtype).expand(len(x_BLC), N, C).scatter(1, index_BKC, x_BLC[:, num_prefix:])
        return self.decoder(torch.cat([x_BLC[:, :num_prefix], full_BNC + self.position], dim=1))[:, num_prefix:]
