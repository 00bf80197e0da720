"""Joint elimination: who leaves together, against plain loops; gates behind a cut, against finite differences."""

from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search_fast import make_variants, preservation, random_mask

from patchrank.pruned import apply_cut
from patchrank.search.criteria import Target, build_damage
from patchrank.search.gates import closing_features, closing_gradients
from patchrank.search.greedy import flipped
from patchrank.search.joint import barred_pairs, joint, round_counts
from patchrank.search.together import best_swap, in_turn, leave_together, one_by_one, trades
from patchrank.search.variants import order_of_masks
from patchrank.spec import RESTS

DENSE_D = torch.tensor([1.0, 0.5, -0.3, 0.2, 0.7])


def damage_of(feature_VD):
    return build_damage("preservation", Target(DENSE_D))(feature_VD)


def changes(seed: int, num: int) -> torch.Tensor:
    return 0.2 * torch.randn(num, 5, generator=torch.Generator().manual_seed(seed))


def foreseen(change_SD, taken) -> float:
    return damage_of((DENSE_D + change_SD[list(taken)].sum(0)).unsqueeze(0))[0].item()


def bars(seed: int, num: int, chance: float) -> torch.Tensor:
    drawn_SS = torch.rand(num, num, generator=torch.Generator().manual_seed(seed)) < chance
    barred_SS = drawn_SS | drawn_SS.mT
    return barred_SS.fill_diagonal_(False)


@given(st.integers(0, 1000), st.integers(2, 7), st.integers(1, 7), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=60, deadline=None)
def test_no_swap_is_left_that_helps_and_bars_hold(seed, num, leaving, chance):
    """Against a plain loop over all allowed swaps: the result has none that helps; greedy alone may have."""
    change_SD, barred_SS = changes(seed, num), bars(seed, num, chance)
    taken = leave_together(DENSE_D, change_SD, damage_of, leaving, barred_SS)
    assert 1 <= len(taken) <= min(leaving, num) and len(set(taken)) == len(taken)
    assert chance > 0 or len(taken) == min(leaving, num)
    assert not any(barred_SS[a, b] for a, b in combinations(taken, 2))
    now = foreseen(change_SD, taken)
    assert sorted(in_turn(DENSE_D, change_SD, damage_of, taken)) == sorted(taken)
    greedy = one_by_one(DENSE_D, change_SD, damage_of, leaving, barred_SS)
    assert now <= foreseen(change_SD, greedy) * (1 + 1e-4) + 1e-9
    for place in range(len(taken)):
        rest = taken[:place] + taken[place + 1 :]
        for other in set(range(num)) - set(taken):
            if not any(barred_SS[other, kept] for kept in rest):
                assert foreseen(change_SD, [*rest, other]) >= now * (1 - 1e-3) - 1e-8


def test_patches_that_cancel_leave_together():
    """Each alone does more damage than the third; together they do none."""
    change_SD = torch.zeros(3, 5)
    change_SD[0, 3], change_SD[1, 3], change_SD[2, 2] = 0.4, -0.4, 0.1
    none_SS = torch.zeros(3, 3, dtype=torch.bool)
    assert one_by_one(DENSE_D, change_SD, damage_of, 2, none_SS)[0] == 2
    assert sorted(leave_together(DENSE_D, change_SD, damage_of, 1, none_SS)) == [2]
    start = [2, 0]
    assert sorted(best_swap(DENSE_D, change_SD, damage_of, start, none_SS)) == [0, 1]
    barred_SS = none_SS.clone()
    barred_SS[0, 1] = barred_SS[1, 0] = True
    assert best_swap(DENSE_D, change_SD, damage_of, start, barred_SS) is None


def test_the_order_within_a_round_is_greedy():
    change_SD = changes(3, 6)
    none_SS = torch.zeros(6, 6, dtype=torch.bool)
    taken = in_turn(DENSE_D, change_SD, damage_of, leave_together(DENSE_D, change_SD, damage_of, 4, none_SS))
    first = min(taken, key=lambda index: foreseen(change_SD, [index]))
    assert taken[0] == first


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.0, 0.5]))
@settings(max_examples=40, deadline=None)
def test_every_trade_is_the_best_of_all_that_are_left(seed, leaving, returning, chance):
    """Against loops over all pairs; after the last one none helps."""
    leave_SD, join_TD = changes(seed, leaving), changes(seed + 1, returning)
    barred_SS, feature_D = bars(seed, leaving, chance), DENSE_D + changes(seed + 2, 1)[0]
    pairs = trades(feature_D, leave_SD, join_TD, damage_of, barred_SS)
    gone, back = [], []
    for turn in range(len(pairs) + 1):
        now_D = feature_D + leave_SD[gone].sum(0) + join_TD[back].sum(0)
        now = damage_of(now_D.unsqueeze(0))[0].item()
        open_pairs = {
            (s, t): damage_of((now_D + leave_SD[s] + join_TD[t]).unsqueeze(0))[0].item()
            for s in range(leaving)
            for t in range(returning)
            if s not in gone and t not in back and not any(barred_SS[s, other] for other in gone)
        }
        if turn == len(pairs):
            assert all(value >= now * (1 - 2e-4) - 1e-8 for value in open_pairs.values())
            break
        assert open_pairs[pairs[turn]] <= min(open_pairs.values()) * (1 + 1e-4) + 1e-8
        assert open_pairs[pairs[turn]] < now
        gone.append(pairs[turn][0])
        back.append(pairs[turn][1])


def test_flipping_a_patch_takes_it_away_or_brings_it_back():
    alive_N = torch.tensor([True, False, True])
    expected = [[False, False, True], [True, True, True]]
    assert flipped(alive_N, torch.tensor([0, 1])).tolist() == expected
    assert alive_N.tolist() == [True, False, True]


@given(st.integers(2, 700), st.integers(1, 20))
def test_rounds_fall_from_the_first_to_the_last_count(num_patches, rounds):
    counts = round_counts(num_patches, rounds)
    assert all(a > b for a, b in pairwise(counts)) and counts[-1] >= 1 and counts[0] <= num_patches
    assert len(counts) <= rounds + 1


@pytest.mark.parametrize("merge_norm", ["preserve", "mean"])
@pytest.mark.parametrize("rest", RESTS)
def test_open_gates_behind_a_cut_are_the_pruned_walk(rest, merge_norm):
    variants = make_variants(rest, merge_norm=merge_norm)
    mask_1N = random_mask(1, 7)
    after, _ = apply_cut(variants.state, order_of_masks(mask_1N), 7, variants.spec, variants.metric_1NM)
    with torch.no_grad():
        feature_1D = closing_features(variants, after, torch.ones(1, 7))
        torch.testing.assert_close(feature_1D, variants.features(mask_1N), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rest", RESTS)
def test_a_closing_gate_has_its_slope(rest):
    variants = make_variants(rest)
    variants.tower.double()
    object.__setattr__(variants.state, "x_BLC", variants.state.x_BLC.double())
    variants.metric_1NM = None if variants.metric_1NM is None else variants.metric_1NM.double()
    after, _ = apply_cut(variants.state, order_of_masks(random_mask(1, 6)), 6, variants.spec, variants.metric_1NM)
    weight_D = torch.randn(24, dtype=torch.float64)

    def value(feature_VD):
        return F.normalize(feature_VD, dim=-1) @ weight_D

    feature_1D, gradient_1K, squared_1K = closing_gradients(variants, after, value, 300, torch.Generator())
    open_1K = torch.ones(1, 6, dtype=torch.float64)
    for place in range(6):
        step_1K = torch.zeros_like(open_1K)
        step_1K[0, place] = 1e-5
        with torch.no_grad():
            up_1D, down_1D = (closing_features(variants, after, open_1K + sign * step_1K) for sign in (1, -1))
        slope = ((value(up_1D) - value(down_1D)) / 2e-5).item()
        assert gradient_1K[0, place].item() == pytest.approx(slope, rel=1e-3, abs=1e-7)
        change_D = (F.normalize(up_1D, dim=-1) - F.normalize(down_1D, dim=-1))[0] / 2e-5
        assert squared_1K[0, place].item() == pytest.approx(change_D.square().sum().item(), rel=0.5)
    torch.testing.assert_close(feature_1D, closing_features(variants, after, open_1K))


@pytest.mark.parametrize("rest", RESTS)
def test_closing_speaks_of_the_patches_alive_and_is_counted(rest):
    variants = make_variants(rest)
    alive_N = random_mask(1, 9)[0]
    before = variants.macs
    with torch.no_grad():
        feature_D, *slopes = variants.closing(alive_N, preservation(variants), torch.Generator().manual_seed(0))
        torch.testing.assert_close(feature_D, variants.features(alive_N.unsqueeze(0))[0], rtol=1e-5, atol=1e-5)
    once = (variants.macs - before) / 6
    assert once == int(once) and once > 0
    for slope_N in slopes:
        assert (slope_N[~alive_N] == 0).all() and (slope_N[alive_N] != 0).all()


def test_a_patch_and_its_host_are_barred_under_fold_only():
    alive_N, index_S = torch.ones(16, dtype=torch.bool), torch.arange(16)
    variants = make_variants("fold")
    unit_NM = F.normalize(variants.metric_1NM[0], dim=-1)
    barred_SS = barred_pairs(variants, alive_N, index_S)
    for i in range(16):
        host = max((j for j in range(16) if j != i), key=lambda j: float(unit_NM[i] @ unit_NM[j]))
        assert barred_SS[i, host] and barred_SS[host, i]
    assert torch.equal(barred_SS, barred_SS.mT) and not barred_SS.diagonal().any()
    assert not barred_pairs(make_variants("drop"), alive_N, index_S).any()


@pytest.mark.parametrize("criterion", ["label", "confidence"])
def test_other_criteria_choose_by_their_own_damage(criterion):
    variants = make_variants("drop")
    weight_YD = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    damage = build_damage(criterion, Target(variants.dense_D, lambda feature_VD: feature_VD @ weight_YD.T, 2))
    with torch.no_grad():
        found = joint(variants, damage, torch.Generator().manual_seed(0), rounds=3)
        other = joint(variants, preservation(variants), torch.Generator().manual_seed(0), rounds=3)
    assert not torch.equal(found.order_N, other.order_N)
