"""The walk that most published methods share: tokens leave between attention and MLP of some blocks.

A method is a subclass with `reduce`; it costs what the patches that it leaves cost, and its choice.

Letters: B batch, P prefix tokens, L tokens, C width.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from eval.rivals.budget import Rival
from patchrank.macs import attention_macs, embed_macs, head_macs, mlp_macs
from patchrank.tower import Block, TowerConfig, VisionTower


@dataclass(frozen=True)
class Step:
    """Where a method may let tokens go: a block between its attention and its MLP."""

    layer: int
    block: Block
    before_BLC: Tensor
    """What entered the block."""
    x_BLC: Tensor
    """Tokens behind the attention half."""
    key_BLC: Tensor
    size_BL: Tensor | None
    """Number of patches that each token stands for; None while every token stands for itself."""
    num_prefix: int

    def sizes(self) -> Tensor:
        """Sizes (B, L) as numbers."""
        return self.x_BLC.new_ones(self.x_BLC.shape[:2]) if self.size_BL is None else self.size_BL


def row_only(config: TowerConfig, layer: int) -> bool:
    """Whether this block computes the class row only, so that nothing can be saved in it."""
    return config.pool == "class" and layer == config.num_layers - 1


def inner_layers(config: TowerConfig) -> tuple[int, ...]:
    """All blocks that tokens can leave in."""
    return tuple(layer for layer in range(config.num_layers) if not row_only(config, layer))


def blocks_between(config: TowerConfig, first: int, last: int) -> tuple[int, ...]:
    """Blocks `first` .. `last` of 12, and the same part of another depth; never one that computes one row."""
    start, stop = first * config.num_layers // 12, -(-(last + 1) * config.num_layers // 12)
    return tuple(layer for layer in range(start, stop) if not row_only(config, layer))


def walk_macs(config: TowerConfig, left: Mapping[int, int], choice: Mapping[int, int]) -> int:
    """MACs per image of the walk.

    Args: left {layer: patches behind that block's attention}, where it changes; choice {layer: MACs of choosing}.
    """
    num_tokens = config.num_prefix + config.num_patches
    total = embed_macs(config)
    for layer in range(config.num_layers):
        if row_only(config, layer):
            total += attention_macs(config, num_tokens, 1) + mlp_macs(config, 1)
            continue
        total += attention_macs(config, num_tokens, num_tokens) + choice.get(layer, 0)
        num_tokens = config.num_prefix + left.get(layer, num_tokens - config.num_prefix)
        total += mlp_macs(config, num_tokens)
    return total + head_macs(config, num_tokens)


class Walk(Rival):
    """A tower in whose blocks `left` {layer: patches that remain} tokens go; `choice` as in `walk_macs`."""

    def __init__(self, tower: VisionTower, left: Mapping[int, int], choice: Mapping[int, int]) -> None:
        super().__init__(tower, walk_macs(tower.config, left, choice))
        self.left = dict(left)

    @abstractmethod
    def reduce(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, P + left, C), prefix first, and sizes (B, P + left), None if keys shall not be weighed."""

    @property
    def first_layer(self) -> int | None:
        return min(self.left, default=None)

    def tokens(self, x_BLC: Tensor, start: int = 0) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, L, C) behind the last block (class row only, where it pools so) and their sizes (B, L').

        Args: tokens (B, P + N, C) that enter block `start`, which lies behind no block that tokens leave in.
        """
        config = self.tower.config
        size_BL, bias_B11L = None, None
        for layer in range(start, config.num_layers):
            block = self.tower.blocks[layer]
            if row_only(config, layer):
                return block.mlp(block.attend_rows(x_BLC, 1, bias_B11L)), size_BL
            before_BLC = x_BLC
            x_BLC, key_BLC = block.attend(x_BLC, bias_B11L)
            if layer in self.left:
                step = Step(layer, block, before_BLC, x_BLC, key_BLC, size_BL, config.num_prefix)
                x_BLC, size_BL = self.reduce(step)
                bias_B11L = None if size_BL is None else size_BL.log()[:, None, None, :]
            x_BLC = block.mlp(x_BLC)
        return x_BLC, size_BL

    def forward_from(self, x_BLC: Tensor, layer: int = 0) -> Tensor:
        return self.tower.head(*self.tokens(x_BLC, layer))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.forward_from(self.tower.embed(image_BCHW))
