"""search/criteria.py: the sign of every criterion on hand-made features, exactness near zero, and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchrank.errors import UserError
from patchrank.search.criteria import CRITERIA, Target, build_damage

DENSE = torch.tensor([2.0, 0.0, 0.0])


def logits(feature_VD: torch.Tensor) -> torch.Tensor:
    return 3.0 * feature_VD


def target(label: int | None = 0) -> Target:
    return Target(DENSE, logits, label)


def test_preservation_is_one_minus_cosine_whatever_the_length() -> None:
    variants = torch.tensor([[2.0, 0, 0], [9.0, 0, 0], [1.0, 1.0, 0], [0, 1.0, 0], [-1.0, 0, 0]])
    damage = build_damage("preservation", target())(variants)
    torch.testing.assert_close(damage, torch.tensor([0.0, 0.0, 1 - 0.5**0.5, 1.0, 2.0]))


def test_preservation_is_exact_where_one_minus_cosine_would_round_to_zero() -> None:
    tilt = 1e-5
    damage = build_damage("preservation", target())(torch.tensor([[1.0, tilt, 0.0]]))
    assert damage.item() == pytest.approx(tilt**2 / 2, rel=1e-3)


def test_label_rises_as_the_true_class_loses() -> None:
    variants = torch.tensor([[2.0, 0, 0], [1.0, 0, 0], [0, 0, 0], [0, 1.0, 0]])
    damage = build_damage("label", target(label=0))(variants)
    torch.testing.assert_close(damage, 1 - logits(variants).softmax(-1)[:, 0])
    assert (damage.diff() > 0).all()


def test_confidence_takes_the_largest_class_of_each_variant_anew() -> None:
    variants = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0.1, 0, 0]])
    damage = build_damage("confidence", target())(variants)
    torch.testing.assert_close(damage, 1 - logits(variants).softmax(-1).amax(-1))
    assert damage[0] == damage[1] < damage[2]


def test_a_posterior_of_almost_one_still_tells_variants_apart() -> None:
    variants = torch.tensor([[7.0, 0, 0], [8.0, 0, 0]])
    damage = build_damage("confidence", target())(variants)
    exact = 1 - logits(variants.double()).softmax(-1).amax(-1)
    torch.testing.assert_close(damage.double(), exact, rtol=1e-4, atol=0)
    assert damage[0] > damage[1] > 0


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(CRITERIA)), st.integers(0, 10_000))
def test_every_criterion_is_finite_never_negative_and_judges_each_variant_alone(criterion: str, seed: int) -> None:
    variants = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    damage = build_damage(criterion, target(label=1))
    found = damage(variants)
    assert found.shape == (5,) and found.dtype == torch.float32
    assert found.isfinite().all() and (found >= 0).all()
    torch.testing.assert_close(found, torch.cat([damage(variants[i : i + 1]) for i in range(5)]))


@pytest.mark.parametrize("criterion", ["label", "confidence"])
def test_classes_are_asked_for_by_name(criterion: str) -> None:
    with pytest.raises(UserError, match="class names"):
        build_damage(criterion, Target(DENSE))


def test_label_needs_a_label() -> None:
    with pytest.raises(UserError, match="no labels"):
        build_damage("label", target(label=None))


def test_an_unknown_criterion_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="preservation, confidence, label"):
        build_damage("loss", target())
