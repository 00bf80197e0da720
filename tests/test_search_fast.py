"""The fast strategies and what they stand on, each against a slow, obvious form."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from hypothesis import given, settings
from hypothesis import strategies as st

from patchrank.search.criteria import Target, build_damage
from patchrank.search.gates import gate_gradients, gated_features, nearest_kept, soft_fold
from patchrank.search.medoids import medoid_order
from patchrank.search.probes import PROBES, covering_scores, judge, normal_scores, top_mask
from patchrank.search.regression import random_masks, ridge
from patchrank.search.strategies import STRATEGIES, Options
from patchrank.search.variants import Variants, prepare
from patchrank.spec import RESTS, PruneSpec
from patchrank.tokens import num_keep

SMALL = Options(step=2, steps=7, randoms=8, mutations=2, rounds=3, masks=48)


def make_variants(rest: str, seed: int = 0, merge_norm: str = "preserve") -> Variants:
    tower = make_tower(seed)
    image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return prepare(tower, image, PruneSpec(cuts=((2, 1.0),), rest=rest, merge_norm=merge_norm), chunk=5)


def preservation(variants: Variants):
    return build_damage("preservation", Target(variants.dense_D))


def random_mask(num: int, K: int, seed: int = 0) -> torch.Tensor:
    return top_mask(torch.rand(num, 16, generator=torch.Generator().manual_seed(seed)), K)


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("merge_norm", ["preserve", "mean"])
@pytest.mark.parametrize("K", [1, 5, 15])
def test_closed_gates_are_the_pruned_walk(rest, merge_norm, K):
    variants = make_variants(rest, merge_norm=merge_norm)
    mask_VN = random_mask(4, K)
    with torch.no_grad():
        gated_VD = gated_features(variants, mask_VN, torch.where(mask_VN, 1.0, 1e-6))
        torch.testing.assert_close(gated_VD, variants.features(mask_VN), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rest", RESTS)
def test_gate_gradient_is_the_slope(rest):
    variants = make_variants(rest)
    variants.tower.double()
    for name in ("x_BLC",):
        object.__setattr__(variants.state, name, getattr(variants.state, name).double())
    variants.metric_1NM = None if variants.metric_1NM is None else variants.metric_1NM.double()
    mask_1N = random_mask(1, 7)
    weight_D = torch.randn(24, dtype=torch.float64)

    def value(feature_VD):
        return F.normalize(feature_VD, dim=-1) @ weight_D

    gradient_1N, _ = gate_gradients(variants, mask_1N, value, 1, torch.Generator().manual_seed(0))
    gate_1N = torch.where(mask_1N, 1.0, 1e-4).double()
    for position in (int(mask_1N[0].nonzero()[0]), int((~mask_1N[0]).nonzero()[0])):
        step = torch.zeros_like(gate_1N)
        step[0, position] = 1e-5
        with torch.no_grad():
            up, down = (value(gated_features(variants, mask_1N, gate_1N + sign * step)) for sign in (1, -1))
        assert gradient_1N[0, position].item() == pytest.approx(((up - down) / 2e-5).item(), rel=1e-3, abs=1e-7)


def test_squared_sensitivity_is_the_jacobian_norm():
    variants = make_variants("fold")
    mask_1N = random_mask(1, 8)
    jacobian_DN = torch.autograd.functional.jacobian(
        lambda gate_1N: F.normalize(gated_features(variants, mask_1N, gate_1N), dim=-1)[0],
        torch.where(mask_1N, 1.0, 1e-4),
    )[:, 0]
    _, squared_1N = gate_gradients(variants, mask_1N, preservation(variants), 400, torch.Generator().manual_seed(0))
    ratio = squared_1N[0] / jacobian_DN.square().sum(0)
    assert 0.9 < ratio.mean() < 1.1 and ratio.min() > 0.6 and ratio.max() < 1.5


def test_nearest_kept_against_a_loop():
    metric_NM, mask_VN = torch.randn(16, 8), random_mask(3, 5)
    host_VNN = nearest_kept(metric_NM, mask_VN)
    unit_NM = F.normalize(metric_NM, dim=-1)
    for v in range(3):
        for i in range(16):
            others = [j for j in range(16) if mask_VN[v, j] and j != i]
            assert host_VNN[v, i].argmax().item() == max(others, key=lambda j: float(unit_NM[i] @ unit_NM[j]))
    assert torch.equal(host_VNN.sum(-1), torch.ones(3, 16))


def test_soft_fold_keeps_all_mass():
    x_VNC, mask_VN = torch.randn(2, 16, 6), random_mask(2, 6)
    gate_VN = mask_VN.float()
    _, size_VN = soft_fold(
        x_VNC, gate_VN, torch.ones_like(gate_VN), nearest_kept(torch.randn(16, 4), mask_VN), "preserve"
    )
    torch.testing.assert_close((gate_VN * size_VN).sum(1), torch.full((2,), 16.0))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 9))
def test_medoid_order_against_a_loop(seed, num_patches):
    generator = torch.Generator().manual_seed(seed)
    metric_NM = torch.randn(num_patches, 3, generator=generator).double()
    weight_N = torch.rand(num_patches, generator=generator).double() + 0.1
    alive, removed = list(range(num_patches)), []
    while len(alive) > 1:
        costs = []
        for leaving in alive:
            rest = [j for j in alive if j != leaving]
            nearest = [
                min(float((metric_NM[i] - metric_NM[j]).square().sum()) for j in rest) for i in range(num_patches)
            ]
            costs.append(sum(float(weight_N[i]) * nearest[i] for i in range(num_patches)))
        leaving = alive[min(range(len(alive)), key=lambda index: costs[index])]
        alive.remove(leaving)
        removed.append(leaving)
    assert medoid_order(metric_NM, weight_N).tolist() == alive + removed[::-1]


def test_ridge_finds_additive_effects():
    effect_N = torch.randn(16).double()
    mask_VN = random_masks(200, 16, 8, torch.Generator().manual_seed(0))
    found_N = ridge(mask_VN, (~mask_VN).double() @ effect_N)
    torch.testing.assert_close(found_N.double(), effect_N - effect_N.mean(), rtol=1e-3, atol=1e-3)


@given(st.integers(1, 40), st.integers(2, 30), st.data())
@settings(max_examples=25, deadline=None)
def test_random_masks_keep_K(num, num_patches, data):
    K = data.draw(st.integers(1, num_patches))
    mask_VN = random_masks(num, num_patches, K, torch.Generator().manual_seed(0))
    assert mask_VN.shape == (num, num_patches) and (mask_VN.sum(1) == K).all()
    if 2 * K == num_patches and num > 1:
        assert torch.equal(mask_VN[0], ~mask_VN[1])


def test_normal_scores_keep_the_order():
    score_SN = torch.randn(3, 16) ** 3
    assert torch.equal(normal_scores(score_SN).argsort(1), score_SN.argsort(1))


@pytest.mark.parametrize("rest", RESTS)
def test_judge_is_the_mean_true_damage(rest):
    variants = make_variants(rest)
    damage = preservation(variants)
    score_SN = torch.randn(3, 16)
    slow = torch.zeros(3)
    for s in range(3):
        for keep in PROBES:
            mask_1N = top_mask(score_SN[s : s + 1], num_keep(keep, 16))
            slow[s] += damage(variants.features(mask_1N))[0] / len(PROBES)
    torch.testing.assert_close(judge(variants, damage, score_SN), slow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rest", RESTS)
def test_covering_scores_count_their_metric(rest):
    variants = make_variants(rest)
    before = variants.macs
    scores_SN = covering_scores(variants, 3, torch.Generator().manual_seed(0))
    assert scores_SN.shape == (3, 16)
    assert (variants.macs > before) == (rest == "drop")


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("rest", RESTS)
def test_every_strategy_is_deterministic_and_ranks_all_patches(name, rest):
    orders = []
    for _ in range(2):
        variants = make_variants(rest)
        before = variants.macs
        with torch.no_grad():
            ranking = STRATEGIES[name].run(variants, preservation(variants), SMALL, torch.Generator().manual_seed(3))
        assert variants.macs > before
        assert sorted(ranking.order_N.tolist()) == list(range(16)) and ranking.order_N.dtype == torch.int16
        assert ranking.score_N.dtype == ranking.trace_N.dtype == torch.float32
        best_first = ranking.score_N[ranking.order_N.long()]
        assert (best_first[:-1] >= best_first[1:]).all()
        orders.append(ranking.order_N)
    assert torch.equal(*orders)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("rest", RESTS)
def test_every_strategy_beats_random_orders(name, rest):
    found, chance = [], []
    for seed in range(4):
        variants = make_variants(rest, seed)
        damage = preservation(variants)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            ranking = STRATEGIES[name].run(variants, damage, SMALL, generator)
            found.append(judge(variants, damage, ranking.score_N.unsqueeze(0))[0])
            chance.append(judge(variants, damage, torch.rand(32, 16, generator=generator)).mean())
    assert torch.stack(found).mean() < torch.stack(chance).mean()
