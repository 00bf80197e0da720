"""From scores to a keep set, through the one selection core: fixed K, whole blocks, or a bounded count per picture.

Letters: B pictures, N patches, U selection units (blocks of `block` x `block` patches), K kept.
"""

import torch
from torch import Tensor

from patchrank.pretrain.masking.context import Selection
from patchrank.tokens import keep_top, num_keep, rank


def pool_blocks(score_BN: Tensor, grid: tuple[int, int], block: int) -> Tensor:
    """Mean score of every block of `block` x `block` patches: (B, U).

    Raises: ValueError if blocks do not fill the grid.
    Source: A-CLIP's released code resizes a 14 x 14 map bilinearly to 7 x 7, which at exactly 2 x is this mean.
    """
    if grid[0] % block or grid[1] % block:
        raise ValueError(f"block={block}: must divide the grid {grid[0]} x {grid[1]}; use block=1")
    rows, columns = grid[0] // block, grid[1] // block
    return score_BN.reshape(-1, rows, block, columns, block).mean((2, 4)).flatten(1)


def expand_blocks(index_BU: Tensor, grid: tuple[int, int], block: int) -> Tensor:
    """Patches (B, num * block^2) int64 of chosen blocks (B, num), ascending."""
    columns = grid[1] // block
    row_BU1, column_BU1 = (index_BU // columns * block)[..., None], (index_BU % columns * block)[..., None]
    inside = torch.arange(block, device=index_BU.device)
    patch_BUP = (row_BU1 + inside.repeat_interleave(block)) * grid[1] + column_BU1 + inside.repeat(block)
    return patch_BUP.flatten(1).sort(dim=1).values


def keep_best(score_BU: Tensor, K: int, tie_BU: Tensor | None = None) -> Tensor:
    """Indices (B, K) int64 of the best scores (B, U), best first; equal ones by the higher `tie_BU`, then by index."""
    if tie_BU is None:
        return keep_top(score_BU, K)
    order_BU = rank(tie_BU)
    return order_BU.gather(1, keep_top(score_BU.gather(1, order_BU), K))


def select(
    score_BX: Tensor, grid: tuple[int, int], keep: float, *, block: int = 1, tie_BN: Tensor | None = None
) -> Selection:
    """The same number of patches of every picture: those of the num_keep(keep, U) best units.

    Args: score (B, N) of patches or (B, U) of units, higher = keep; grid of patches; keep ratio in (0, 1] of units;
    tie (B, N): noise that decides between equal scores; None: the lowest index stays.
    Raises: ValueError for a ratio outside (0, 1] or blocks that do not fill the grid.
    Source: PGS's released code cuts ties in raster order, which thins the bottom of every picture; hence the chance.
    """
    score_BU = unit_scores(score_BX, grid, block)
    tie_BU = None if tie_BN is None else unit_scores(tie_BN, grid, block)
    index_BU = keep_best(score_BU, num_keep(keep, score_BU.shape[1]), tie_BU)
    return Selection(expand_blocks(index_BU, grid, block))


def unit_scores(score_BX: Tensor, grid: tuple[int, int], block: int) -> Tensor:
    """Scores of units (B, U), from scores of patches where they are such."""
    return pool_blocks(score_BX, grid, block) if score_BX.shape[1] == grid[0] * grid[1] else score_BX


def select_bounded(
    score_BN: Tensor, least: float, most: float, threshold: float, *, tie_BN: Tensor | None = None
) -> Selection:
    """A count per picture: patches that score above `threshold`, but no fewer than `least` and no more than `most`.

    Args: score (B, N), higher = keep; 0 < least <= most <= 1, ratios of N. Returns: K = num_keep(most, N) entries a
    row, whatever the batch holds; padding stands last, its indices are real patches that `valid_BK` switches off.
    Source: the reading of PGS-0.3 in which the ratio moves between bounds. Deviation from its released code: the count
    does not depend on other pictures, and padding is blocked for good (as a key of size zero).
    """
    N = score_BN.shape[1]
    K = num_keep(most, N)
    count_B = (score_BN > threshold).sum(1).clamp(num_keep(least, N), K)
    keep_BK = keep_best(score_BN, K, tie_BN)
    valid_BK = torch.arange(K, device=score_BN.device) < count_B[:, None]
    order_BK = torch.where(valid_BK, keep_BK, keep_BK + N).argsort(dim=1)
    return Selection(keep_BK.gather(1, order_BK), valid_BK)


def search_threshold(score_BN: Tensor, mean_keep: float, *, num_halvings: int = 30) -> Tensor:
    """Threshold (scalar) above which the share `mean_keep` of all scores lies, by bisection; no host synchronisation.

    To be found once, on a few batches, and then fixed: a threshold found in every batch would let pictures depend on
    each other. Source: E-CLIP documents this search (target 0.5, tolerance 1e-3) and never calls it. Deviations: a
    fixed number of halvings, as a share of tied scores can step over the target; bounds are the scores' own.
    """
    low, high = score_BN.min(), score_BN.max()
    for _ in range(num_halvings):
        middle = (low + high) / 2
        above = (score_BN > middle).float().mean() > mean_keep
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return high
