"""metrics.py: against scikit-learn, loops, and cases whose answer is known."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, auc, balanced_accuracy_score, top_k_accuracy_score

from patchrank.metrics import (
    accuracy,
    curve_mean,
    interval,
    kendall_tau,
    mean_per_class,
    paired_interval,
    recall_at_k,
    resampled_means,
)

seeds = st.integers(0, 10_000)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(seed: int, num: int, num_classes: int) -> torch.Tensor:
    return torch.randint(num_classes, (num,), generator=torch.Generator().manual_seed(seed + 1))


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 30), st.integers(3, 6), st.data())
def test_accuracy_equals_sklearn(seed: int, num: int, num_classes: int, data) -> None:
    logits_BY, label_B = drawn(seed, num, num_classes), labels(seed, num, num_classes)
    k = data.draw(st.integers(1, num_classes - 1))
    assert accuracy(logits_BY, label_B) == pytest.approx(accuracy_score(label_B, logits_BY.argmax(1)))
    expected = top_k_accuracy_score(label_B, logits_BY, k=k, labels=range(num_classes))
    assert accuracy(logits_BY, label_B, k) == pytest.approx(expected)


def test_tied_logits_fall_to_the_lowest_class() -> None:
    assert accuracy(torch.zeros(2, 3), torch.tensor([0, 1])) == 0.5
    assert accuracy(torch.zeros(2, 3), torch.tensor([0, 1]), k=2) == 1.0


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 40), st.integers(2, 6))
def test_mean_per_class_equals_sklearn(seed: int, num: int, num_classes: int) -> None:
    predicted_B, label_B = labels(seed + 5, num, num_classes), labels(seed, num, num_classes)
    with warnings.catch_warnings():  # sklearn warns of predicted classes that are absent
        warnings.simplefilter("ignore", UserWarning)
        expected = balanced_accuracy_score(label_B, predicted_B)
    assert mean_per_class(predicted_B, label_B) == pytest.approx(expected)


def test_mean_per_class_weighs_a_rare_class_like_a_common_one() -> None:
    assert mean_per_class(torch.zeros(10, dtype=torch.int64), torch.tensor([0] * 9 + [3])) == 0.5


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 8), st.integers(2, 9), st.data())
def test_recall_equals_a_loop(seed: int, num_queries: int, num_gallery: int, data) -> None:
    similarity_QG = drawn(seed, num_queries, num_gallery)
    match_QG = drawn(seed + 1, num_queries, num_gallery) > 0.5
    k = data.draw(st.integers(1, num_gallery))
    found = 0
    for similarity_G, match_G in zip(similarity_QG.tolist(), match_QG.tolist()):
        best = sorted(range(num_gallery), key=lambda item: -similarity_G[item])[:k]
        found += any(match_G[item] for item in best)
    assert recall_at_k(similarity_QG, match_QG, k) == pytest.approx(found / num_queries)


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: accuracy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), k=4), "k=4"),
        (lambda: accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)), "no samples"),
        (lambda: mean_per_class(torch.zeros(0).long(), torch.zeros(0).long()), "no samples"),
        (lambda: recall_at_k(torch.zeros(2, 3), torch.zeros(2, 3).bool(), 0), "k=0"),
        (lambda: recall_at_k(torch.zeros(0, 3), torch.zeros(0, 3).bool(), 1), "no queries"),
        (lambda: curve_mean(torch.tensor([0.3, 0.3]), torch.zeros(2)), "must be two or more and rise"),
        (lambda: curve_mean(torch.tensor([0.3]), torch.zeros(1)), "must be two or more and rise"),
        (lambda: resampled_means(torch.zeros(0, 2)), "no images"),
    ],
)
def test_what_is_undefined_is_refused(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1, width=16), min_size=2, max_size=9, unique=True), seeds)
def test_curve_mean_equals_sklearn_over_the_width(points: list[float], seed: int) -> None:
    at_M = torch.tensor(sorted(points), dtype=torch.float64)
    value_2M = drawn(seed, 2, len(points)).double()
    expected = [auc(at_M, value_M) / (at_M[-1] - at_M[0]).item() for value_M in value_2M]
    assert curve_mean(at_M, value_2M).tolist() == pytest.approx(expected)


def test_curve_mean_of_a_constant_is_that_constant() -> None:
    assert curve_mean(torch.tensor([0.1, 0.2, 0.9]), torch.full((3,), 0.7)).item() == pytest.approx(0.7)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(7)), st.permutations(range(7)))
def test_kendall_tau_counts_pairs(order: list[int], other: list[int]) -> None:
    pairs = [(a, b) for a in range(7) for b in range(a)]
    agree = sum((order.index(a) < order.index(b)) == (other.index(a) < other.index(b)) for a, b in pairs)
    expected = (2 * agree - len(pairs)) / len(pairs)
    assert kendall_tau(torch.tensor(order, dtype=torch.int16), torch.tensor(other)) == pytest.approx(expected)


def test_resampled_means_are_means_of_drawn_rows_paired_over_columns() -> None:
    value_I = drawn(0, 12).double()
    mean_R2 = resampled_means(torch.stack([value_I, value_I + 1], dim=1), num_resamples=50, seed=3)
    drawn_RI = torch.randint(12, (50, 12), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mean_R2[:, 0], value_I[drawn_RI].mean(1))
    torch.testing.assert_close(mean_R2[:, 1] - mean_R2[:, 0], torch.ones(50, dtype=torch.float64))


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        low, high = interval(resampled_means(drawn(seed, 60, 1) + 5, num_resamples=400, seed=seed)[:, 0])
        covered += low <= 5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_interval_is_made_of_quantiles() -> None:
    assert interval(torch.arange(101.0)) == pytest.approx((2.5, 97.5))
    assert interval(torch.arange(101.0), level=0.5) == pytest.approx((25, 75))


def test_a_constant_difference_has_no_width() -> None:
    value_I = drawn(0, 9)
    assert paired_interval(value_I + 0.25, value_I) == pytest.approx((0.25, 0.25), abs=1e-6)
