"""Scorers that need no training: (State) -> score (B, N) float32, higher = keep. One row each in `SCORERS`.

Letters: B batch, N patches present, G all patches of the grid, C width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from patchrank.pruned import State


class PositionPrior(nn.Module):
    """The same score for a grid position in every image: `score_G` (G,) float."""

    def __init__(self, score_G: Tensor) -> None:
        super().__init__()
        self.register_buffer("score_G", score_G.float())

    def forward(self, state: State) -> Tensor:
        return self.score_G.to(state.x_BLC.device)[state.position_BN]


def random_prior(grid: tuple[int, int], seed: int = 0) -> Tensor:
    """A random permutation of 0 .. G-1 as score (G,), fixed by `seed`."""
    return torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(seed)).float()


def checkerboard_prior(grid: tuple[int, int], seed: int = 0) -> Tensor:
    """Nested checkerboards (G,): every second patch first, then every second of the rest, and so on.

    A position's score is the number of times it survives halving the lattice, alternately along diagonals and along
    rows; `seed` shuffles within a level.
    """
    row_G = torch.arange(grid[0]).repeat_interleave(grid[1])
    column_G = torch.arange(grid[1]).repeat(grid[0])
    level_G = torch.zeros(grid[0] * grid[1])
    alive_G = torch.ones_like(level_G, dtype=torch.bool)
    step = 1
    while step < max(grid):
        alive_G = alive_G & ((row_G // step + column_G // step) % 2 == 0)
        level_G += alive_G
        alive_G = alive_G & ((row_G // step) % 2 == 0)
        level_G += alive_G
        step *= 2
    return level_G + random_prior(grid, seed) / (grid[0] * grid[1])


def centre_prior(grid: tuple[int, int], seed: int = 0) -> Tensor:
    """Minus the distance to the image centre in patches (G,); `seed` shuffles equal distances."""
    row_G = torch.arange(grid[0]).repeat_interleave(grid[1]) - (grid[0] - 1) / 2
    column_G = torch.arange(grid[1]).repeat(grid[0]) - (grid[1] - 1) / 2
    return -torch.hypot(row_G, column_G) + 1e-3 * random_prior(grid, seed) / (grid[0] * grid[1])


def mean_rank_prior(order_BG: Tensor) -> Tensor:
    """Mean golden score of every position over images: (G,) in [0, 1]. Args: orders (B, G), best first."""
    num_patches = order_BG.shape[1]
    rank_BG = order_BG.long().argsort(dim=1)
    return ((num_patches - 1 - rank_BG).float() / max(1, num_patches - 1)).mean(0)


def token_norm(state: State) -> Tensor:
    """Length of each token."""
    return state.patches_BNC.norm(dim=-1)


def class_attention(state: State) -> Tensor:
    """Attention that the class token (first prefix token) pays to each patch in the block of the cut, mean over heads.

    Raises: ValueError for a tower without prefix tokens.
    Source: EViT (Liang et al. 2022, section 3.2); one row of the attention only, so fused attention stays on.
    """
    if state.num_prefix == 0:
        raise ValueError("class-attention: this tower has no class token; use token-norm or a position prior")
    return state.block.class_attention(state.x_BLC, state.num_prefix)


def _position(prior: Callable[..., Tensor]) -> Callable[[tuple[int, int], int], PositionPrior]:
    return lambda grid, seed=0: PositionPrior(prior(grid, seed))


SCORERS: dict[str, Callable[[tuple[int, int], int], Callable[[State], Tensor]]] = {
    "random": _position(random_prior),
    "checkerboard": _position(checkerboard_prior),
    "centre": _position(centre_prior),
    "token-norm": lambda grid, seed=0: token_norm,
    "class-attention": lambda grid, seed=0: class_attention,
}
"""Name -> builder (grid, seed) -> scorer. `mean-rank` and `golden` need rankings and are made from a store."""
