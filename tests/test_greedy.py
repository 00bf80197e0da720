"""search/greedy.py: the cached search against a slow, obvious one that runs the whole tower for every candidate."""

import pytest
import torch
from conftest import make_tower
from hypothesis import given, settings
from hypothesis import strategies as st

from patchrank.pruned import PrunedTower
from patchrank.search.criteria import CRITERIA, Target, build_damage
from patchrank.search.greedy import apart, greedy, hosts_of, least_harmful, step_size
from patchrank.search.variants import Variants, prepare
from patchrank.spec import RESTS, PruneSpec

CLASSES = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))


def logits(feature_VD: torch.Tensor) -> torch.Tensor:
    return feature_VD @ CLASSES


def image_of(seed: int) -> torch.Tensor:
    return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed))


def slow_damage(tower, image_CHW, spec: PruneSpec, criterion: str, keep: list[int]) -> float:
    """Run the whole tower from the pixels with these patches kept, and judge the one feature."""
    score_BN = torch.full((1, 16), -1.0)
    score_BN[0, keep] = 1.0
    pruned = PrunedTower(tower, spec.with_keep(len(keep) / 16), None)
    damage = build_damage(criterion, Target(tower(image_CHW[None])[0], logits, 2))
    return damage(pruned(image_CHW[None], score_BN)).item()


def slow_greedy(tower, image_CHW, spec: PruneSpec, criterion: str) -> tuple[list[int], list[float]]:
    """Try every removal, take the least harmful (lowest index of those equal within rounding), repeat."""
    alive, removed, values = list(range(16)), [], []
    while len(alive) > 1:
        without = [[other for other in alive if other != gone] for gone in alive]
        tried = [slow_damage(tower, image_CHW, spec, criterion, keep) for keep in without]
        limit = min(tried) + 4e-6 * max(min(tried), 0) ** 0.5
        gone = next(patch for patch, value in zip(alive, tried) if value <= limit)
        values.append(tried[alive.index(gone)])
        removed.append(gone)
        alive.remove(gone)
    return alive + removed[::-1], values


@pytest.mark.parametrize("seed, layer, chunk", [(0, 2, 5), (1, 0, 16), (2, 3, 7)])
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_cached_greedy_gives_the_order_of_the_slow_one(criterion: str, rest: str, seed: int, layer: int, chunk: int):
    tower, image_CHW = make_tower(seed), image_of(seed)
    spec = PruneSpec(cuts=((layer, 1.0),), rest=rest)
    with torch.inference_mode():
        variants = prepare(tower, image_CHW, spec, chunk)
        damage = build_damage(criterion, Target(variants.dense_D, logits, 2))
        found = greedy(variants, damage)
        order, values = slow_greedy(tower, image_CHW, spec, criterion)
    assert found.order_N.tolist() == order
    trace_by_removal = found.trace_N[found.order_N.long().flip(0)[:15]]
    torch.testing.assert_close(trace_by_removal, torch.tensor(values), rtol=1e-3, atol=1e-5)
    assert found.score_N[found.order_N.long()].tolist() == pytest.approx([(15 - rank) / 15 for rank in range(16)])


@pytest.mark.parametrize("pool", [dict(pool="mean", num_prefix=0), dict(pool="attention", num_prefix=0)])
@pytest.mark.parametrize("rest", RESTS)
def test_towers_without_a_class_token_too(pool: dict, rest: str) -> None:
    tower, spec = make_tower(3, **pool), PruneSpec(cuts=((1, 1.0),), rest=rest)
    with torch.inference_mode():
        variants = prepare(tower, image_of(3), spec)
        found = greedy(variants, build_damage("preservation", Target(variants.dense_D)))
        assert found.order_N.tolist() == slow_greedy(tower, image_of(3), spec, "preservation")[0]


class Additive(Variants):
    """Every patch is worth a fixed amount; the feature is what the kept ones are worth together."""

    metric_1NM = None

    def __init__(self, worth: list[float]) -> None:
        self.worth_N = torch.tensor(worth)
        self.state = type("State", (), dict(x_BLC=torch.zeros(1), grid=(1, len(worth))))
        self.calls = []

    @property
    def num_patches(self) -> int:
        return len(self.worth_N)

    def features(self, mask_VN: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(mask_VN))
        return (mask_VN * self.worth_N).sum(1, keepdim=True)

    def damage(self, feature_VD: torch.Tensor) -> torch.Tensor:
        return self.worth_N.sum() - feature_VD[:, 0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=12), st.integers(1, 4), st.booleans())
def test_the_worthless_go_first_whatever_the_step(worth: list[int], step: int, decay: bool) -> None:
    variants = Additive([float(value) for value in worth])
    found = greedy(variants, variants.damage, step=step, decay=decay)
    kept_worth = [worth[patch] for patch in found.order_N.tolist()]
    assert sorted(found.order_N.tolist()) == list(range(len(worth)))
    assert kept_worth == sorted(worth, reverse=True)


def test_equal_patches_go_in_index_order() -> None:
    variants = Additive([1.0] * 5)
    assert greedy(variants, variants.damage).order_N.tolist() == [4, 3, 2, 1, 0]


def test_exact_greedy_looks_at_every_survivor_each_round() -> None:
    variants = Additive([float(value) for value in range(6)])
    greedy(variants, variants.damage)
    assert variants.calls == [6, 5, 4, 3, 2]


def test_ties_within_rounding_fall_to_the_lowest_index_and_clear_ones_do_not() -> None:
    assert least_harmful(torch.tensor([0.5, 0.1 + 1e-7, 0.1]), 1).tolist() == [1]
    assert least_harmful(torch.tensor([0.5, 0.1 + 1e-4, 0.1]), 1).tolist() == [2]
    assert least_harmful(torch.tensor([0.3, 0.1, 0.2, 0.1]), 3).tolist() == [1, 3, 2]


@given(st.integers(2, 700), st.integers(1, 50), st.booleans(), st.data())
def test_step_size_never_takes_the_last_patch(num_patches: int, step: int, decay: bool, data) -> None:
    num_alive = data.draw(st.integers(2, num_patches))
    size = step_size(num_alive, num_patches, step, decay)
    assert 1 <= size <= min(step, num_alive - 1) or size == 1


def test_a_patch_and_its_host_never_leave_together_under_fold():
    angle_N = torch.deg2rad(torch.tensor([0.0, 1.0, 90.0, 91.0, 200.0]))
    metric_NM = torch.stack([angle_N.cos(), angle_N.sin()], dim=1)
    host_N = hosts_of(metric_NM, torch.ones(5, dtype=torch.bool))
    assert host_N.tolist() == [1, 0, 3, 2, 3]
    assert apart(torch.tensor([0, 1, 2, 3, 4]), host_N, 3) == [0, 2, 4]
    assert apart(torch.tensor([1, 0]), host_N, 2) == [1]
