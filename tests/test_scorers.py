"""scorers.py: every row of the table: shape, range, determinism, and what it says about patches that moved."""

from dataclasses import replace

import pytest
import torch
from conftest import make_tower

from patchrank.pruned import apply_cut, start_state
from patchrank.scorers import (
    SCORERS,
    PositionPrior,
    centre_prior,
    checkerboard_prior,
    class_attention,
    mean_rank_prior,
    random_prior,
    token_norm,
)
from patchrank.spec import PruneSpec
from patchrank.tokens import rank


@pytest.fixture
def state(tower, images):
    return start_state(tower, tower.run(tower.embed(images), 0, 2), 2)


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_gives_one_finite_float_per_patch_and_the_same_again(name: str, state) -> None:
    score_BN = SCORERS[name](state.grid, 3)(state)
    assert score_BN.shape == (3, 16) and score_BN.dtype == torch.float32
    assert score_BN.isfinite().all()
    assert all(len(row.unique()) == 16 for row in score_BN)
    assert torch.equal(score_BN, SCORERS[name](state.grid, 3)(state))


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_follows_patches_behind_a_cut(name: str, state) -> None:
    """The same patches in another order get the same scores in that order."""
    scorer = SCORERS[name](state.grid, 0)
    order_BN = torch.stack([torch.randperm(16) for _ in range(3)])
    moved, _ = apply_cut(state, order_BN, 16, PruneSpec(cuts=((2, 1.0),), rest="drop"), None)
    torch.testing.assert_close(scorer(moved), scorer(state).gather(1, order_BN), rtol=1e-4, atol=1e-6)


def test_priors_read_the_original_position() -> None:
    prior = PositionPrior(torch.arange(16))
    state = start_state(make_tower(), torch.zeros(1, 17, 32), 0)
    kept = replace(state, position_BN=torch.tensor([[9, 4]]))
    assert prior(kept).tolist() == [[9.0, 4.0]]


def test_random_depends_on_the_seed_alone() -> None:
    assert sorted(random_prior((4, 5), 1).tolist()) == list(range(20))
    assert not torch.equal(random_prior((4, 5), 1), random_prior((4, 5), 2))


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (4, 6)])
def test_checkerboard_keeps_every_second_patch_then_every_fourth(grid) -> None:
    order_N = rank(checkerboard_prior(grid)[None])[0]
    row_N, column_N = order_N // grid[1], order_N % grid[1]
    num_black = (grid[0] * grid[1] + 1) // 2
    assert ((row_N + column_N)[:num_black] % 2 == 0).all()
    num_quarter = -(-grid[0] // 2) * -(-grid[1] // 2)
    assert (row_N[:num_quarter] % 2 == 0).all() and (column_N[:num_quarter] % 2 == 0).all()


def test_centre_falls_with_the_distance_from_the_middle() -> None:
    order_N = rank(centre_prior((5, 7))[None])[0]
    distance_N = torch.hypot(order_N // 7 - 2.0, order_N % 7 - 3.0)
    assert order_N[0] == 2 * 7 + 3
    assert (distance_N.diff() >= -1e-6).all()


def test_mean_rank_is_the_mean_golden_score() -> None:
    order_BG = torch.tensor([[2, 0, 1], [2, 1, 0]], dtype=torch.int16)
    torch.testing.assert_close(mean_rank_prior(order_BG), torch.tensor([0.25, 0.25, 1.0]))


def test_token_norm_is_the_length_of_the_patches(state) -> None:
    torch.testing.assert_close(token_norm(state), state.x_BLC[:, 1:].square().sum(-1).sqrt())


def test_class_attention_is_a_share_and_needs_a_class_token(state, images) -> None:
    score_BN = class_attention(state)
    assert (score_BN > 0).all() and (score_BN.sum(1) < 1).all()
    tower = make_tower(pool="mean", num_prefix=0)
    with pytest.raises(ValueError, match="no class token"):
        class_attention(start_state(tower, tower.embed(images), 0))
