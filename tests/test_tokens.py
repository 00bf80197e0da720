"""tokens.py: counts, order, gather, fold and suppress against slow loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchrank.tokens import (
    assign_to_nearest,
    fold_tokens,
    gather_tokens,
    keep_top,
    num_keep,
    rank,
    suppress,
    unfold_tokens,
)

quick = settings(max_examples=40, deadline=None)
sizes = st.tuples(st.integers(1, 3), st.integers(2, 12), st.integers(0, 10_000))


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 2000).flatmap(lambda N: st.tuples(st.integers(1, N), st.just(N))))
def test_num_keep_gives_every_count_back(pair) -> None:
    K, N = pair
    assert num_keep(K / N, N) == K


@given(st.floats(1e-6, 1.0), st.integers(1, 2000))
def test_num_keep_stays_within_its_range_and_rounds(keep: float, N: int) -> None:
    K = num_keep(keep, N)
    assert 1 <= K <= N
    assert abs(K - keep * N) <= 0.5 + 1e-6 or K == 1


def test_num_keep_on_the_counts_that_the_papers_use() -> None:
    assert [num_keep(keep, 196) for keep in (0.8, 0.6, 0.4, 0.25)] == [157, 118, 78, 49]
    assert num_keep(0.5, 49) == 25


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_num_keep_refuses_other_ratios(keep: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        num_keep(keep, 10)


@quick
@given(sizes)
def test_rank_is_a_permutation_with_falling_scores_and_ties_in_index_order(size) -> None:
    B, N, seed = size
    score_BN = randn(B, N, seed=seed).round()
    order_BN = rank(score_BN)
    for score_N, order_N in zip(score_BN.tolist(), order_BN.tolist()):
        assert order_N == sorted(range(N), key=lambda index: (-score_N[index], index))


@quick
@given(sizes, st.data())
def test_keep_top_is_nested_in_K(size, data) -> None:
    B, N, seed = size
    K = data.draw(st.integers(1, N))
    score_BN = randn(B, N, seed=seed).round()
    assert torch.equal(keep_top(score_BN, K), keep_top(score_BN, N)[:, :K])


def test_keep_top_with_a_generator_breaks_ties_at_random_and_nothing_else() -> None:
    score_1N = torch.tensor([[1.0, 0.0, 0.0, 0.0, 2.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = [keep_top(score_1N, 3, generator=generator)[0].tolist() for _ in range(60)]
    assert all(order[:2] == [4, 0] for order in drawn)
    assert {order[2] for order in drawn} == {1, 2, 3}


@quick
@given(sizes)
def test_gather_takes_the_named_rows(size) -> None:
    B, N, seed = size
    x_BNC, index_BK = randn(B, N, 3, seed=seed), rank(randn(B, N, seed=seed + 1))[:, : N // 2 + 1]
    assert torch.equal(gather_tokens(x_BNC, index_BK), torch.stack([x_BNC[b, index_BK[b]] for b in range(B)]))


def slow_fold(kept_KC, rest_RC, assign_R, size_K, size_R, merge_norm: str):
    tokens, sizes = [], []
    for k in range(len(kept_KC)):
        members = [(kept_KC[k], size_K[k]), *((rest_RC[r], size_R[r]) for r in range(len(rest_RC)) if assign_R[r] == k)]
        total = sum(size for _, size in members)
        token = sum(x_C * size for x_C, size in members) / total
        if merge_norm == "preserve":
            token = token / token.norm() * (sum(x_C.norm() * size for x_C, size in members) / total)
        tokens.append(token)
        sizes.append(total)
    return torch.stack(tokens), torch.stack(sizes)


@quick
@given(sizes, st.data(), st.sampled_from(["mean", "preserve"]))
def test_fold_equals_a_loop_and_sizes_add_up(size, data, merge_norm: str) -> None:
    B, N, seed = size
    K = data.draw(st.integers(1, N - 1))
    kept, rest = randn(B, K, 5, seed=seed), randn(B, N - K, 5, seed=seed + 1)
    assign = torch.randint(K, (B, N - K), generator=torch.Generator().manual_seed(seed))
    size_BK, size_BR = randn(B, K, seed=seed + 2).abs() + 0.5, randn(B, N - K, seed=seed + 3).abs() + 0.5
    folded_BKC, total_BK = fold_tokens(kept, rest, assign, size_BK, size_BR, merge_norm=merge_norm)
    torch.testing.assert_close(total_BK.sum(1), size_BK.sum(1) + size_BR.sum(1))
    for b in range(B):
        token_KC, total_K = slow_fold(kept[b], rest[b], assign[b], size_BK[b], size_BR[b], merge_norm)
        torch.testing.assert_close(total_BK[b], total_K)
        torch.testing.assert_close(folded_BKC[b], token_KC, rtol=1e-4, atol=1e-5)


def test_fold_refuses_an_unknown_merge_norm() -> None:
    one = torch.ones(1, 1, 2)
    with pytest.raises(ValueError, match="'mean' or 'preserve'"):
        fold_tokens(one, one, torch.zeros(1, 1).long(), torch.ones(1, 1), torch.ones(1, 1), merge_norm="max")


def test_assign_picks_the_highest_cosine_and_the_lowest_index_of_equals() -> None:
    kept = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]])
    rest = torch.tensor([[[5.0, 1.0], [0.1, 2.0]]])
    assert assign_to_nearest(rest, kept).tolist() == [[0, 1]]


@quick
@given(sizes)
def test_suppress_equals_a_loop(size) -> None:
    B, N, seed = size
    priority_BN, metric_BNM = randn(B, N, seed=seed).round(), randn(B, N, 4, seed=seed + 1)
    found_BN = suppress(priority_BN, metric_BNM)
    unit_BNM = torch.nn.functional.normalize(metric_BNM, dim=-1)
    for b in range(B):
        for i in range(N):
            p = priority_BN[b].tolist()
            ahead = [j for j in range(N) if p[j] > p[i] or (p[j] == p[i] and j < i)]
            slow = max((float(unit_BNM[b, i] @ unit_BNM[b, j]) for j in ahead), default=-2.0)
            assert found_BN[b, i].item() == pytest.approx(-slow, abs=1e-5)


def test_suppress_prefers_a_patch_that_differs_over_a_copy_of_higher_priority() -> None:
    metric = torch.tensor([[[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]]])
    assert rank(suppress(torch.tensor([[3.0, 2.0, 1.0]]), metric))[0].tolist() == [0, 2, 1]


@quick
@given(sizes, st.data())
def test_unfold_gives_each_position_its_own_token_or_its_hosts(size, data) -> None:
    B, N, seed = size
    K = data.draw(st.integers(1, N))
    order_BN = rank(randn(B, N, seed=seed))
    keep, rest = order_BN[:, :K], order_BN[:, K:]
    assign = torch.randint(K, rest.shape, generator=torch.Generator().manual_seed(seed))
    folded = randn(B, K, 3, seed=seed + 1)
    full = unfold_tokens(folded, keep, rest, assign)
    for b in range(B):
        for k in range(K):
            assert torch.equal(full[b, keep[b, k]], folded[b, k])
        for r in range(N - K):
            assert torch.equal(full[b, rest[b, r]], folded[b, assign[b, r]])
