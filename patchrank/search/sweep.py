"""One leave-block-out sweep: slide an r x r window, score every patch by the windows that cover it (no interactions).

Letters: N patches, W windows.
"""

import torch
from torch import Tensor

from patchrank.errors import UserError
from patchrank.search.criteria import Damage
from patchrank.search.ranking import Ranking, ranking_from_score
from patchrank.search.variants import Variants


def windows(grid: tuple[int, int], size: int, stride: int) -> Tensor:
    """Windows of `size` x `size` patches as (W, N) bool; the last one of a row or column is pulled in to fit.

    Raises: UserError if a window does not fit the grid.
    """
    rows, columns = grid
    if not 1 <= size <= min(grid) or size * size >= rows * columns:
        raise UserError(f"--window {size}: must be 1 to {min(grid)} on this {rows} x {columns} grid, and leave a patch")
    if stride < 1:
        raise UserError(f"--stride {stride}: must be 1 or more")
    tops = sorted({min(top, rows - size) for top in range(0, rows, stride)})
    lefts = sorted({min(left, columns - size) for left in range(0, columns, stride)})
    cover = torch.zeros(len(tops) * len(lefts), rows, columns, dtype=torch.bool)
    for index, (top, left) in enumerate((top, left) for top in tops for left in lefts):
        cover[index, top : top + size, left : left + size] = True
    return cover.flatten(1)


def coverage_mean(value_W: Tensor, cover_WN: Tensor) -> Tensor:
    """Mean of the windows' values over those that cover each patch: (N,); a patch under no window gets the mean of all.

    Source: Patch Ranking, eq. 4, divided by the true coverage count (the paper's r^2 holds for inner patches only).
    """
    count_N = cover_WN.sum(0)
    total_N = (value_W.unsqueeze(1) * cover_WN).sum(0)
    return torch.where(count_N > 0, total_N / count_N.clamp_min(1), value_W.mean())


def sweep(variants: Variants, damage: Damage, *, window: int = 1, stride: int = 1) -> Ranking:
    """Rank by the damage that losing the surrounding window does.

    Source: Patch Ranking, section 3.1; r and the stride are not given there, 1 and 1 are our defaults.
    """
    cover_WN = windows(variants.state.grid, window, stride).to(variants.state.x_BLC.device)
    damage_W = damage(variants.features(~cover_WN))
    return ranking_from_score(coverage_mean(damage_W, cover_WN))
