"""Our own batch-first vision transformer with visible seams: embed -> blocks -> head. Attention is SDPA only.

One class stands for every tower we load (`patchrank.loading`): OpenAI / LAION / MetaCLIP / SigLIP / timm / Hugging Face
differ in `TowerConfig`, never in code paths of a batch.

Letters: B batch, P prefix tokens (class token, registers, added tokens), N patches, L = P + N tokens, C width,
H heads, D feature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchrank.attention import attention
from patchrank.linear import Linear, linear


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Everything that distinguishes one frozen tower from another."""

    image_size: tuple[int, int]
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str = "gelu"
    norm_eps: float = 1e-5
    num_prefix: int = 1
    patch_bias: bool = False
    pre_norm: bool = False
    layer_scale: bool = False
    qkv_bias: bool = True
    pool: str = "class"
    """"class" token, "mean" over the patches, or "attention" (a learned query over all tokens)."""
    norm: str = "before_pool"
    """Final LayerNorm "before_pool", "after_pool" or "none"."""
    output_dim: int | None = None
    """Columns of the projection; None where the pooled token itself is the feature."""
    output_bias: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def feature_dim(self) -> int:
        """D."""
        return self.output_dim or self.width


def _heads(x_BLC: Tensor, num_heads: int) -> Tensor:
    """(B, L, C) -> (B, H, L, C/H)."""
    return x_BLC.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block whose attention half and MLP half can be called apart (a cut may stand between)."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(width, config.norm_eps)
        self.qkv = Linear(width, 3 * width, bias=config.qkv_bias)
        self.out = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, config.norm_eps)
        self.fc1 = Linear(width, config.mlp_width, activation=config.activation)
        self.fc2 = Linear(config.mlp_width, width)
        self.scale1 = nn.Parameter(torch.ones(width)) if config.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if config.layer_scale else None

    def _attention_residual(self, x_BQC: Tensor, q_BQC: Tensor, k_BLC: Tensor, v_BLC: Tensor, bias_B11L) -> Tensor:
        q, k, v = (_heads(part, self.num_heads) for part in (q_BQC, k_BLC, v_BLC))
        update_BQC = self.out(attention(q, k, v, bias_B11L).transpose(1, 2).flatten(2))
        return x_BQC + (update_BQC if self.scale1 is None else update_BQC * self.scale1)

    def attend(self, x_BLC: Tensor, bias_B11L: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attention half: tokens (B, L, C) after the residual, and this block's keys (B, L, C).

        `bias_B11L` is added to every query's logit of a key: log of how many patches that token stands for.
        """
        q, k, v = self.qkv(self.norm1(x_BLC)).chunk(3, dim=-1)
        return self._attention_residual(x_BLC, q, k, v, bias_B11L), k

    def _project(self, h_BLC: Tensor, first: int, stop: int) -> Tensor:
        """Parts first .. stop-1 of (q, k, v) of normalised tokens."""
        width = h_BLC.shape[-1]
        rows = slice(first * width, stop * width)
        return linear(h_BLC, self.qkv.weight[rows], None if self.qkv.bias is None else self.qkv.bias[rows])

    def attend_rows(self, x_BLC: Tensor, num_rows: int, bias_B11L: Tensor | None = None) -> Tensor:
        """Attention half for the first `num_rows` tokens as queries; keys and values of all. Exact for those rows."""
        h_BLC = self.norm1(x_BLC)
        q = self._project(h_BLC[:, :num_rows], 0, 1)
        k, v = self._project(h_BLC, 1, 3).chunk(2, dim=-1)
        return self._attention_residual(x_BLC[:, :num_rows], q, k, v, bias_B11L)

    def mlp(self, x_BLC: Tensor) -> Tensor:
        """MLP half with its residual."""
        update_BLC = self.fc2(self.fc1(self.norm2(x_BLC)))
        return x_BLC + (update_BLC if self.scale2 is None else update_BLC * self.scale2)

    def forward(self, x_BLC: Tensor, bias_B11L: Tensor | None = None) -> Tensor:
        return self.mlp(self.attend(x_BLC, bias_B11L)[0])

    def keys(self, x_BLC: Tensor) -> Tensor:
        """Just this block's keys (B, L, C)."""
        return self._project(self.norm1(x_BLC), 1, 2)

    def mean_head(self, key_BLC: Tensor) -> Tensor:
        """Keys averaged over heads, (B, L, C/H): the metric of folding."""
        return key_BLC.unflatten(-1, (self.num_heads, -1)).mean(-2)

    def class_saliency(self, first_B1C: Tensor, key_BNC: Tensor) -> Tensor:
        """Attention (B, N) float that the class token, as it enters the block (B, 1, C), pays to patches of these keys
        (B, N, C), of what it pays to patches; mean over heads. Computes one row of queries."""
        q = _heads(self._project(self.norm1(first_B1C), 0, 1), self.num_heads)
        logit_BH1N = q @ _heads(key_BNC, self.num_heads).mT * q.shape[-1] ** -0.5
        return logit_BH1N.softmax(-1).mean(1).squeeze(1)

    def class_attention(self, x_BLC: Tensor, num_prefix: int) -> Tensor:
        """Attention of token 0 to the patches, mean over heads: (B, N) float; computes q of one row and all keys."""
        h_BLC = self.norm1(x_BLC)
        q = _heads(self._project(h_BLC[:, :1], 0, 1), self.num_heads)
        k = _heads(self._project(h_BLC, 1, 2), self.num_heads)
        attention_BH1L = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return attention_BH1L.mean(1).squeeze(1)[:, num_prefix:]


class AttentionPool(nn.Module):
    """Pooling by one learned query over all tokens, then an MLP with residual (SigLIP's head)."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.out = Linear(width, width)
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.fc1 = Linear(width, config.mlp_width, activation=config.activation)
        self.fc2 = Linear(config.mlp_width, width)

    def forward(self, x_BLC: Tensor, bias_B11L: Tensor | None = None) -> Tensor:
        """(B, L, C) -> (B, C); `bias_B11L` as in `Block.attend`."""
        q = _heads(self.q(self.query.expand(x_BLC.shape[0], -1, -1)), self.num_heads)
        k, v = (_heads(part, self.num_heads) for part in self.kv(x_BLC).chunk(2, dim=-1))
        pooled = self.out(attention(q, k, v, bias_B11L).transpose(1, 2).flatten(2))
        return (pooled + self.fc2(self.fc1(self.norm(pooled))))[:, 0]


class VisionTower(nn.Module):
    """image (B, 3, H, W) float -> feature (B, D) float, not normalised; each stage is a method of its own."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=config.patch_bias)
        self.prefix = nn.Parameter(torch.zeros(config.num_prefix, width))
        self.position = nn.Parameter(torch.zeros(config.num_patches, width))
        self.norm_pre = nn.LayerNorm(width, config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.Identity() if config.norm == "none" else nn.LayerNorm(width, config.norm_eps)
        self.pool = AttentionPool(config) if config.pool == "attention" else None
        self.proj = Linear(width, config.output_dim, bias=config.output_bias) if config.output_dim else nn.Identity()

    def embed(self, image_BCHW: Tensor) -> Tensor:
        """Image -> tokens (B, P + N, C) that enter block 0; the prefix carries its own position."""
        patches_BNC = self.patch(image_BCHW).flatten(2).transpose(1, 2) + self.position
        prefix_BPC = self.prefix.to(patches_BNC.dtype).expand(image_BCHW.shape[0], -1, -1)
        return self.norm_pre(torch.cat([prefix_BPC, patches_BNC], dim=1))

    def run(self, x_BLC: Tensor, start: int, stop: int, bias_B11L: Tensor | None = None) -> Tensor:
        """Blocks start .. stop-1."""
        for block in self.blocks[start:stop]:
            x_BLC = block(x_BLC, bias_B11L)
        return x_BLC

    def finish(self, x_BLC: Tensor, start: int, size_BL: Tensor | None = None, num_prefix: int | None = None) -> Tensor:
        """Blocks `start` .. end and the head: (B, L, C) -> (B, D).

        With class-token pooling the last block computes one row only, which changes no result.
        Args: size_BL float, patches that each token stands for (None: one each); num_prefix if tokens were added.
        """
        return self.proj(self.finish_pooled(x_BLC, start, size_BL, num_prefix))

    def finish_pooled(self, x_BLC: Tensor, start: int, size_BL: Tensor | None = None, num_prefix=None) -> Tensor:
        """`finish` without the projection."""
        bias_B11L = None if size_BL is None else size_BL.log()[:, None, None, :]
        last = self.config.num_layers - 1
        if self.config.pool != "class" or start > last:
            x_BLC = self.run(x_BLC, start, last + 1, bias_B11L)
        else:
            x_BLC = self.run(x_BLC, start, last, bias_B11L)
            x_BLC = self.blocks[last].mlp(self.blocks[last].attend_rows(x_BLC, 1, bias_B11L))
        return self.pooled(x_BLC, size_BL, num_prefix)

    def head(self, x_BLC: Tensor, size_BL: Tensor | None = None, num_prefix: int | None = None) -> Tensor:
        """Tokens after the last block -> feature (B, D); mean pooling counts each token `size_BL` times."""
        return self.proj(self.pooled(x_BLC, size_BL, num_prefix))

    def pooled(self, x_BLC: Tensor, size_BL: Tensor | None = None, num_prefix: int | None = None) -> Tensor:
        """`head` without the projection."""
        if self.config.norm == "before_pool" and self.config.pool == "class":
            pooled_BC = self.norm(x_BLC[:, 0])
        else:
            x_BLC = self.norm(x_BLC) if self.config.norm == "before_pool" else x_BLC
            pooled_BC = self._pool(x_BLC, size_BL, self.config.num_prefix if num_prefix is None else num_prefix)
            pooled_BC = self.norm(pooled_BC) if self.config.norm == "after_pool" else pooled_BC
        return pooled_BC

    def _pool(self, x_BLC: Tensor, size_BL: Tensor | None, num_prefix: int) -> Tensor:
        if self.config.pool == "class":
            return x_BLC[:, 0]
        if self.config.pool == "attention":
            return self.pool(x_BLC, None if size_BL is None else size_BL.log()[:, None, None, :])
        patches_BNC = x_BLC[:, num_prefix:]
        if size_BL is None:
            return patches_BNC.mean(1)
        size_BN1 = size_BL[:, num_prefix:, None]
        return (patches_BNC * size_BN1).sum(1) / size_BN1.sum(1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.finish(self.embed(image_BCHW), 0)
