"""The pair of towers in training and how it starts. Letters: C width, N patches, Q = C / 4 frequencies."""

import math

import torch
from torch import Tensor, nn

from patchrank.text import TextConfig, TextTower
from patchrank.tower import Block, TowerConfig, VisionTower

MAX_SCALE = 100.0
"""Limit of the logit scale. Source: Radford et al. 2021, section 2.5."""

_SHARPNESS = 1.6
"""Size of the local part of queries and keys: about half of a head's attention falls on one patch."""
_OFFSETS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]


class Pair(nn.Module):
    """Image tower, text tower and the logarithm of the logit scale (starts at 1 / 0.07)."""

    def __init__(self, tower: VisionTower, text: TextTower) -> None:
        super().__init__()
        self.tower = tower
        self.text = text
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the logit scale in [1, MAX_SCALE]."""
        self.log_scale.clamp_(0.0, math.log(MAX_SCALE))


def build_pair(tower_config: TowerConfig, text_config: TextConfig, seed: int, start: str = "local") -> Pair:
    """Fresh towers; the same seed gives the same weights, and the global generator is left as it was.

    Args: start: "local", sine-cosine positions and attention heads that look at a neighbour each; or "usual".
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        pair = Pair(VisionTower(tower_config), TextTower(text_config))
        for tower in (pair.tower, pair.text):
            for block in tower.blocks:
                _start(block, len(tower.blocks))
        nn.init.normal_(pair.tower.prefix, std=0.02)
        if start == "usual":
            nn.init.normal_(pair.tower.position, std=0.02)
            return pair
        pair.tower.position.copy_(sine_cosine(tower_config.grid, tower_config.width))
        offsets = [_OFFSETS[number] for number in torch.randperm(len(_OFFSETS)).tolist()]
        for number, block in enumerate(pair.tower.blocks):
            reach = 1 if number < len(pair.tower.blocks) // 3 else 2
            for head in range(block.num_heads):
                row, column = offsets[(number * block.num_heads + head) % len(offsets)]
                look_at(block, head, reach * row, reach * column)
    return pair


def locked_pair(tower: VisionTower, text_config: TextConfig, seed: int) -> Pair:
    """A checkpoint's image tower, frozen, beside a fresh text tower.

    Source: LiT (Zhai et al. 2022): the image tower is locked and in eval mode. Deviation: no head on top of it.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        pair = Pair(tower.eval().requires_grad_(False), TextTower(text_config))
        for block in pair.text.blocks:
            _start(block, len(pair.text.blocks))
    return pair


def _start(block: Block, num_layers: int) -> None:
    for layer in (block.qkv, block.out, block.fc1, block.fc2):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    for layer in (block.out, block.fc2):
        layer.weight.mul_((2 * num_layers) ** -0.5)


def _frequencies(width: int) -> Tensor:
    """Radians per patch (Q,), from 1.5 down to 0.19: all of them turn within a grid of 14."""
    num = width // 4
    return 1.5 * 8.0 ** -(torch.arange(num) / max(num - 1, 1))


def sine_cosine(grid: tuple[int, int], width: int) -> Tensor:
    """Position table (N, C) float32: sine and cosine of the row, then of the column. `width` a multiple of 4."""
    row_N, column_N = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    row_NQ, column_NQ = (place.flatten()[:, None] * _frequencies(width) for place in (row_N, column_N))
    return torch.cat([row_NQ.sin(), row_NQ.cos(), column_NQ.sin(), column_NQ.cos()], dim=1)


def look_at(block: Block, head: int, row: int, column: int) -> None:
    """Set one head's queries and keys so that every patch attends to the one `row`, `column` patches away.

    A shift turns each (sine, cosine) pair of `sine_cosine` by a fixed angle; queries are turned, keys are not. A head
    takes every num_heads-th frequency. The random start stays, at a fifth of its size.
    Source: the idea of ConViT (d'Ascoli et al. 2021, section 3) in the weights of plain attention, as structured
    initialization (Zheng et al. 2024). Deviation: sine-cosine positions inside the tokens instead of a separate term.
    """
    width = block.qkv.weight.shape[1]
    num_freq = width // 4
    size = width // block.num_heads
    rate_Q = _frequencies(width)
    query, key = torch.zeros(size, width), torch.zeros(size, width)
    line = 0
    for first, distance in ((0, row), (2 * num_freq, column)):
        for q in range(head, num_freq, block.num_heads):
            sine, cosine = first + q, first + num_freq + q
            angle = float(rate_Q[q]) * distance
            query[line, sine], query[line, cosine] = math.cos(angle), math.sin(angle)
            query[line + 1, cosine], query[line + 1, sine] = math.cos(angle), -math.sin(angle)
            key[line, sine] = key[line + 1, cosine] = 1.0
            line += 2
    for part, local in ((0, query), (width, key)):
        rows = slice(part + head * size, part + (head + 1) * size)
        block.qkv.weight[rows] = 0.2 * block.qkv.weight[rows] + _SHARPNESS * local


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices of blocks, heads and projections decay; biases, norms, embeddings, positions and the scale do not.

    Frozen parameters (a locked tower, the teacher) are in no group. Deviation: A-CLIP's released code exempts only
    vectors and names with bias, ln or bn, so that there positions and embeddings decay as well.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim == 2 and name.endswith("weight") and "text.token" not in name
            groups[decays].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]
