"""`select=cover`: against its definition, how sizes and importances move it, inside a tower, and its gradient."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from patchrank.macs import pruned_macs
from patchrank.pruned import PrunedTower
from patchrank.spec import PruneSpec
from patchrank.tokens import cover, rank, suppress
from patchrank.tower import VisionTower
from predictors.smooth import gates

TOWER = make_tower()
SPEC = PruneSpec(cuts=((1, 0.75), (2, 0.5)), where="inside", select="cover")


def slow_cover(score_N, metric_NM, size_N) -> list[float]:
    """The definition, patch by patch."""
    weight = [score + 0.5 * math.log(size) for score, size in zip(score_N.tolist(), size_N.tolist(), strict=True)]
    out = []
    for i, own in enumerate(weight):
        ahead = [j for j, other in enumerate(weight) if other > own or (other == own and j < i)]
        likes = [F.cosine_similarity(metric_NM[i], metric_NM[j], dim=0).item() for j in ahead]
        out.append(own + math.log(max(1e-6, 1 - max(likes))) if likes else own + math.log(3))
    return out


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.sampled_from([0.0, 1.0]))
def test_equals_its_definition(seed: int, num_patches: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    score_BN = scale * torch.randn(2, num_patches, generator=generator, dtype=torch.float64)
    metric_BNM = torch.randn(2, num_patches, 3, generator=generator, dtype=torch.float64)
    size_BN = torch.randint(1, 4, (2, num_patches), generator=generator).double()
    slow_BN = torch.tensor([slow_cover(*rows) for rows in zip(score_BN, metric_BNM, size_BN, strict=True)])
    torch.testing.assert_close(cover(score_BN, metric_BNM, size_BN), slow_BN.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cover(score_BN, metric_BNM, torch.ones_like(size_BN)), cover(score_BN, metric_BNM))


def test_equal_importances_choose_as_suppress_does() -> None:
    metric_BNM = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(0))
    zero_BN = torch.zeros(4, 9)
    assert torch.equal(rank(cover(zero_BN, metric_BNM)), rank(suppress(zero_BN, metric_BNM)))


def test_a_large_importance_keeps_a_patch_that_looks_like_another() -> None:
    metric_1NM = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.3]]])
    assert rank(cover(torch.zeros(1, 4), metric_1NM))[0, -1] == 1
    assert rank(cover(torch.tensor([[0.0, 9.0, 0.0, 0.0]]), metric_1NM))[0, 0] == 1
    many_1N = torch.tensor([[1.0, 900.0, 1.0, 1.0]])
    assert rank(cover(torch.zeros(1, 4), metric_1NM, many_1N))[0, 0] == 1


def test_the_tower_selects_by_it_and_counts_it() -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pruned = PrunedTower(TOWER, SPEC, lambda state: state.patches_BNC.norm(dim=-1).log())
    state, cuts = pruned.tokens(images)
    assert [cut.keep_BK.shape[1] for cut in cuts] == [12, 8]
    assert torch.equal(state.size_BN.sum(1), torch.full((2,), 16.0))
    suppressed = PrunedTower(TOWER, replace(SPEC, select="suppress"), pruned.scorer)
    assert not torch.allclose(pruned(images), suppressed(images))
    assert SPEC.covers and not PruneSpec(cuts=()).covers
    with torch.device("meta"):
        tower, image = VisionTower(TOWER.config).eval().requires_grad_(False), torch.empty(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        PrunedTower(tower, SPEC, lambda state: state.patches_BNC[..., 0])(image)
    assert pruned_macs(TOWER.config, SPEC) == counter.get_total_flops() // 2


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_gates_are_hard_and_slope_most_at_the_threshold(slope: float) -> None:
    score_BA = torch.tensor([[3.0, 2.0, 1.1, 0.9, 0.0, -2.0]], requires_grad=True)
    gate_BA = gates(score_BA, 3, slope)
    assert torch.equal(gate_BA[0, :3], torch.ones(3)) and (gate_BA[0, 3:] < 1e-3).all()
    (gradient_BA,) = torch.autograd.grad(gate_BA[0, 2], score_BA)
    (far_BA,) = torch.autograd.grad(gates(score_BA, 3, slope)[0, 5], score_BA)
    assert (gradient_BA[0, 2] > far_BA[0, 5] > 0) if slope else (gradient_BA == 0).all()
    (all_BA,) = torch.autograd.grad(gates(score_BA, 3, slope).sum(), score_BA)
    torch.testing.assert_close(all_BA.sum(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert torch.equal(gates(score_BA, 6), torch.ones(1, 6))
