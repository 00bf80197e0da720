"""Losses: least at the golden ranking, blind to scale where they should be, combined by name and weight."""

import pytest
import torch

from patchrank.errors import UserError
from predictors.losses import (
    FEATURE_LOSSES,
    GOLDEN_LOSSES,
    answer_divergence,
    combine,
    feature_distance,
    feature_error,
    listwise,
    needs_feature,
    needs_golden,
    pairwise,
    parse_weights,
    soft_bce,
)
from predictors.scorers import standardise

GOLDEN = torch.randn(3, 11, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("name", GOLDEN_LOSSES)
def test_the_golden_scores_themselves_are_the_minimum(name: str) -> None:
    loss = GOLDEN_LOSSES[name]
    best = loss(standardise(GOLDEN), GOLDEN)
    generator = torch.Generator().manual_seed(1)
    for scale in (0.01, 0.3, 3.0):
        other_BN = standardise(GOLDEN) + scale * torch.randn(GOLDEN.shape, generator=generator)
        assert loss(other_BN, GOLDEN) > best - 1e-9
    assert loss(-standardise(GOLDEN), GOLDEN) > best + 0.1
    torch.testing.assert_close(loss(standardise(GOLDEN), 7 * GOLDEN + 2), best)


@pytest.mark.parametrize("name", GOLDEN_LOSSES)
def test_gradient_descent_on_a_golden_loss_finds_the_ranking(name: str) -> None:
    score_BN = torch.randn(GOLDEN.shape, generator=torch.Generator().manual_seed(2)).requires_grad_(True)
    optimiser = torch.optim.Adam([score_BN], lr=0.1)
    for _ in range(150):
        optimiser.zero_grad()
        GOLDEN_LOSSES[name](score_BN, GOLDEN).backward()
        optimiser.step()
    top_found, top_golden = score_BN.topk(4).indices.sort().values, GOLDEN.topk(4).indices.sort().values
    assert torch.equal(top_found, top_golden)


def test_bce_has_a_minimum_and_listwise_is_zero_there() -> None:
    """Eq. 8 as printed has none: its loss falls without end as all scores grow."""
    assert soft_bce(standardise(GOLDEN) + 20, GOLDEN) > soft_bce(standardise(GOLDEN), GOLDEN)
    torch.testing.assert_close(listwise(standardise(GOLDEN), GOLDEN), torch.tensor(0.0).double(), atol=1e-9, rtol=0)


def test_the_margin_cannot_be_met_by_scale() -> None:
    noisy_BN = GOLDEN + torch.randn(GOLDEN.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(pairwise(100 * noisy_BN, GOLDEN), pairwise(noisy_BN, GOLDEN))
    assert pairwise(noisy_BN, GOLDEN) > 0 and pairwise(GOLDEN, GOLDEN) == 0


def test_feature_losses() -> None:
    dense_BD = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert all(loss(dense_BD, dense_BD) == 0 for loss in FEATURE_LOSSES.values())
    turned_BD = torch.tensor([[4.0, 3.0], [0.0, 1.0]])
    torch.testing.assert_close(feature_distance(turned_BD, dense_BD), torch.tensor((1 - 24 / 25 + 1) / 2))
    torch.testing.assert_close(feature_distance(2 * dense_BD, dense_BD), torch.tensor(0.0))
    torch.testing.assert_close(feature_error(2 * dense_BD, dense_BD), torch.tensor(0.5))


def test_answers_diverge_by_the_shift_of_logits_only_where_it_is_not_common() -> None:
    dense_BY = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    torch.testing.assert_close(answer_divergence(dense_BY + 3.0, dense_BY), torch.tensor(0.0), atol=1e-6, rtol=0)
    one_BY = torch.tensor([[0.0, 0.0]])
    sure_BY = torch.tensor([[1.0, 3.0]]).log()
    torch.testing.assert_close(answer_divergence(sure_BY, one_BY), 0.5 * torch.tensor(4 / 3).log())


def test_weights_by_name() -> None:
    assert parse_weights("distill") == {"distill": 1.0}
    assert parse_weights("distill:1,listwise:0.1") == {"distill": 1.0, "listwise": 0.1}
    assert needs_golden({"bce": 1.0}) and not needs_golden({"distill": 1.0})
    assert needs_feature({"error": 1.0}) and not needs_feature({"bce": 1.0})
    for text, words in (
        ("distil", "'distil' is unknown; choose from distill, error, bce, listwise, pairwise"),
        ("bce:x", "'x' is no number; write bce:0.5"),
        ("bce:0", "must be positive"),
        ("bce:nan", "must be positive"),
        ("", "'' is unknown"),
    ):
        with pytest.raises(UserError, match=words):
            parse_weights(text)


def test_combine_adds_up() -> None:
    score_BN, feature_BD = torch.randn(3, 11), torch.randn(3, 4)
    dense_BD = torch.randn(3, 4)
    total, terms = combine(
        {"distill": 2.0, "bce": 0.5},
        score_BN=score_BN,
        golden_BN=GOLDEN.float(),
        feature_BD=feature_BD,
        dense_BD=dense_BD,
    )
    assert list(terms) == ["distill", "bce"]
    torch.testing.assert_close(total, 2 * terms["distill"] + 0.5 * terms["bce"])
    alone, _ = combine({"listwise": 1.0}, score_BN=score_BN, golden_BN=GOLDEN.float())
    torch.testing.assert_close(alone, listwise(score_BN, GOLDEN.float()))
