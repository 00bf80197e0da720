"""Compensation tokens: a few tokens that give the frozen upper blocks back what the patches behind a cut carried.

Modules (State, score (B, N), K) -> (B, T, C) that `PrunedTower` asks at its first cut; the tokens join the prefix.
Both start close to harmless: with tokens that say what the patches say on average.

Letters: B batch, N patches present, K kept, R = N - K rest, T added tokens, C width, M query channels.
"""

import torch
from torch import Tensor, nn

from patchrank.linear import Linear
from patchrank.pruned import State
from patchrank.tokens import gather_tokens, rank
from predictors.scorers import normalised


class StaticTokens(nn.Module):
    """T learned tokens, the same for every image.

    Args: grid is not used (all rows of the table take it); width C; num_added T.
    """

    def __init__(self, grid: tuple[int, int], *, width: int, num_added: int = 1) -> None:
        super().__init__()
        self.token_TC = nn.Parameter(0.02 * torch.randn(num_added, width))

    def forward(self, state: State, score_BN: Tensor, K: int) -> Tensor:
        return self.token_TC.to(state.x_BLC.dtype).expand(state.x_BLC.shape[0], -1, -1)

    def macs(self, num_patches: int, K: int) -> int:
        """None: the tokens are constants."""
        return 0


class SummaryTokens(nn.Module):
    """T learned queries, each a weighted mean of the patches that were not kept, plus a learned token.

    The rest has the same number of patches in every image, so shapes are static. The mean starts as a plain mean,
    EViT's fused token (Liang et al. 2022, section 3.2) without its attention weights.
    Args: width C; num_added T; dim: channels M in which queries and patches are compared.
    """

    def __init__(self, grid: tuple[int, int], *, width: int, num_added: int = 1, dim: int = 16) -> None:
        super().__init__()
        self.dim = dim
        self.key = Linear(width, dim, bias=False)
        self.query_TM = nn.Parameter(torch.zeros(num_added, dim))
        self.token_TC = nn.Parameter(torch.zeros(num_added, width))
        nn.init.normal_(self.query_TM, std=0.02)

    def forward(self, state: State, score_BN: Tensor, K: int) -> Tensor:
        token_BTC = self.token_TC.to(state.x_BLC.dtype).expand(state.x_BLC.shape[0], -1, -1)
        rest_BR = rank(score_BN)[:, K:]
        if rest_BR.shape[1] == 0:
            return token_BTC
        rest_BRC = gather_tokens(state.patches_BNC, rest_BR)
        weight_BTR = (self.query_TM @ self.key(normalised(rest_BRC)).mT * self.dim**-0.5).softmax(-1)
        return token_BTC + weight_BTR @ rest_BRC

    def macs(self, num_patches: int, K: int) -> int:
        """Keys of the rest, their products with the queries, and the weighted means."""
        num_added, width = self.token_TC.shape
        return (num_patches - K) * (width * self.dim + num_added * (self.dim + width))
