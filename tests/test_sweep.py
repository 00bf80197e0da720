"""search/sweep.py: windows, the coverage mean against a loop, and the sign."""

import pytest
import torch
from conftest import make_tower
from hypothesis import given, settings
from hypothesis import strategies as st
from test_greedy import Additive

from patchrank.errors import UserError
from patchrank.pruned import PrunedTower
from patchrank.search.criteria import Target, build_damage
from patchrank.search.sweep import coverage_mean, sweep, windows
from patchrank.search.variants import prepare
from patchrank.spec import RESTS, PruneSpec

grids = st.tuples(st.integers(2, 7), st.integers(2, 7))


@settings(max_examples=40, deadline=None)
@given(grids, st.data())
def test_windows_are_whole_and_distinct_and_leave_no_patch_out(grid, data) -> None:
    size = data.draw(st.integers(1, min(grid) if grid[0] != grid[1] else min(grid) - 1))
    stride = data.draw(st.integers(1, 4))
    cover_WN = windows(grid, size, stride)
    assert (cover_WN.sum(1) == size * size).all()
    assert len(cover_WN.unique(dim=0)) == len(cover_WN)
    for window in cover_WN.view(-1, *grid):
        rows, columns = window.any(1).nonzero().flatten(), window.any(0).nonzero().flatten()
        assert len(rows) == len(columns) == size and rows[-1] - rows[0] == columns[-1] - columns[0] == size - 1
    if stride <= size:  # wider strides leave gaps on purpose
        assert cover_WN.any(0).all()


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(1, 3), st.integers(0, 10_000))
def test_coverage_mean_equals_a_loop(grid, stride: int, seed: int) -> None:
    size = 1 if min(grid) == 2 else 2
    cover_WN = windows(grid, size, stride)
    value_W = torch.randn(len(cover_WN), generator=torch.Generator().manual_seed(seed))
    found_N = coverage_mean(value_W, cover_WN)
    for patch in range(grid[0] * grid[1]):
        over = [value_W[w].item() for w in range(len(cover_WN)) if cover_WN[w, patch]]
        expected = sum(over) / len(over) if over else value_W.mean().item()
        assert found_N[patch].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rest", RESTS)
def test_a_sweep_of_single_patches_is_leave_one_out(rest: str) -> None:
    tower, spec = make_tower(), PruneSpec(cuts=((2, 1.0),), rest=rest)
    image_CHW = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        variants = prepare(tower, image_CHW, spec, 5)
        damage = build_damage("preservation", Target(variants.dense_D))
        found = sweep(variants, damage)
        pruned = PrunedTower(tower, spec.with_keep(15 / 16), None)
        score_BN = torch.ones(16, 16).fill_diagonal_(-1.0)
        slow_N = damage(pruned(image_CHW.expand(16, -1, -1, -1), score_BN))
    torch.testing.assert_close(found.score_N, slow_N, rtol=1e-3, atol=1e-6)
    assert found.order_N.tolist() == found.score_N.argsort(descending=True, stable=True).tolist()


def test_the_patch_that_matters_comes_first() -> None:
    variants = Additive([0.0, 0.0, 5.0, 1.0])
    assert sweep(variants, variants.damage).order_N.tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize("window, stride, word", [(0, 1, "--window 0"), (5, 1, "--window 5"), (4, 1, "leave a patch")])
def test_a_window_that_does_not_fit_is_refused(window: int, stride: int, word: str) -> None:
    with pytest.raises(UserError, match=word):
        windows((4, 4), window, stride)


def test_a_stride_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="--stride 0"):
        windows((4, 4), 2, 0)
