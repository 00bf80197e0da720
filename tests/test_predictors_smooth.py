"""The walk with gates: equal to the true walk at real keep sets, gradients that are the slope of opening a patch."""

import pytest
import torch
from conftest import make_tower
from hypothesis import given, settings
from hypothesis import strategies as st

from patchrank.pruned import PrunedTower
from patchrank.spec import MERGE_NORMS, RESTS, SELECTS, WHERES, PruneSpec
from predictors.smooth import Perturb, gated_fold, host_weights, smooth_features
from predictors.tables import build_added, build_scorer

POOLS = {"class": {}, "mean": dict(pool="mean", num_prefix=0, norm="after_pool")}
TOWERS = {name: make_tower(**changes) for name, changes in POOLS.items()}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))
CUTS = (((0, 0.5),), ((2, 0.3),), ((1, 0.8), (2, 0.5), (3, 0.2)), ((1, 0.6), (3, 0.4)))


def learned(tower, spec: PruneSpec, metric_dim: int = 0) -> PrunedTower:
    torch.manual_seed(1)
    added = build_added("summary", tower.config, num_added=spec.num_added) if spec.num_added else None
    scorer = build_scorer("mlp", tower.config, metric_dim=metric_dim, weighted=metric_dim > 0)
    if metric_dim:
        torch.nn.init.constant_(scorer.sharpness, 0.7)
    return PrunedTower(tower, spec, scorer, added)


def tokens_at(tower, layer: int) -> torch.Tensor:
    return tower.run(tower.embed(IMAGES), 0, layer)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(list(POOLS)),
    st.sampled_from(CUTS),
    st.sampled_from(WHERES),
    st.sampled_from(RESTS),
    st.sampled_from(SELECTS),
    st.sampled_from(MERGE_NORMS),
    st.sampled_from([0, 6]),
    st.sampled_from([0, 2]),
)
def test_features_equal_the_true_walk(pool, cuts, where, rest, select, merge_norm, metric_dim, num_added) -> None:
    tower = TOWERS[pool]
    spec = PruneSpec(cuts=cuts, where=where, rest=rest, select=select, merge_norm=merge_norm, num_added=num_added)
    pruned = learned(tower, spec, metric_dim)
    with torch.no_grad():
        x_BLC = tokens_at(tower, cuts[0][0])
        feature_BD, scores = smooth_features(pruned, x_BLC, cuts[0][0])
        torch.testing.assert_close(feature_BD, pruned.forward_from(x_BLC, cuts[0][0]), rtol=1e-2, atol=1e-2)
    counts = [16, *(K for _, K in spec.counts(16))]
    assert [score_BA.shape for score_BA in scores] == [(3, num) for num in counts[:-1]]


def test_noise_of_a_part_is_that_part_of_the_noise_of_the_whole() -> None:
    score_BN = torch.zeros(4, 16)
    whole_BN = Perturb(0.3, torch.Generator().manual_seed(5))(score_BN)
    for rows in (slice(0, 2), slice(2, 4)):
        part = Perturb(0.3, torch.Generator().manual_seed(5), rows, 4)
        assert torch.equal(part(score_BN[rows]), whole_BN[rows])


def test_gates_need_the_size_bias() -> None:
    tower = TOWERS["class"]
    pruned = learned(tower, PruneSpec(cuts=((1, 0.5),), size_bias=False))
    with pytest.raises(ValueError, match="gates act through the size bias"):
        smooth_features(pruned, tokens_at(tower, 1), 1)


def test_forward_from_equals_the_whole_walk() -> None:
    for tower in TOWERS.values():
        pruned = learned(tower, PruneSpec(cuts=((2, 0.5), (3, 0.3)), select="suppress"))
        with torch.no_grad():
            assert torch.equal(pruned.forward_from(tokens_at(tower, 2), 2), pruned(IMAGES))


@pytest.mark.parametrize("rest", RESTS)
def test_every_score_gets_the_slope_of_its_gate(rest: str) -> None:
    """Finite differences of the fold and the key weights at gates of 1 and almost 0, against autograd."""
    generator = torch.Generator().manual_seed(0)
    x_BAC = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    host_BAK = host_weights(torch.randn(2, 7, 4, generator=generator, dtype=torch.float64), 3)
    size_BA = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 2.0], dtype=torch.float64).expand(2, -1)
    gate_BA = torch.tensor([1.0] * 3 + [0.1] * 4, dtype=torch.float64).expand(2, -1).clone().requires_grad_(True)

    def value(gate_BA):
        folded_BAC, sizes_BA = gated_fold(x_BAC, size_BA, gate_BA, host_BAK, "preserve")
        return (folded_BAC.sin().sum(-1) * sizes_BA * gate_BA).sum()

    assert torch.autograd.gradcheck(value, (gate_BA,))
    spec = PruneSpec(cuts=((1, 0.5), (2, 0.25)), rest=rest, select="suppress")
    pruned = learned(TOWERS["class"], spec)
    seen = []
    scorer = pruned.scorer.forward
    pruned.scorer.forward = lambda state: seen.append(scorer(state)) or seen[-1]
    feature_BD, _ = smooth_features(pruned, tokens_at(TOWERS["class"], 1), 1)
    gradients = torch.autograd.grad(feature_BD.square().sum(), seen)
    assert all((gradient_BA != 0).all() for gradient_BA in gradients)


def test_sizes_add_up_and_hosts_are_kept() -> None:
    metric_BAM = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1))
    host_BAK = host_weights(metric_BAM, 4)
    assert torch.equal(host_BAK.sum(-1), torch.ones(2, 9))
    assert all(host_BAK[b, i, i] == 0 for b in range(2) for i in range(4))
    gate_BA = torch.tensor([1.0] * 4 + [0.0] * 5).expand(2, -1)
    _, size_BA = gated_fold(torch.randn(2, 9, 3), torch.ones(2, 9), gate_BA, host_BAK, "mean")
    torch.testing.assert_close(size_BA[:, :4].sum(1), torch.full((2,), 9.0))


def test_metric_and_added_tokens_get_a_gradient() -> None:
    pruned = learned(TOWERS["class"], PruneSpec(cuts=((1, 0.5),), num_added=2, select="suppress"), metric_dim=6)
    feature_BD, _ = smooth_features(pruned, tokens_at(TOWERS["class"], 1), 1)
    feature_BD.square().sum().backward()
    for part in (pruned.scorer, pruned.added):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters() if p.numel() > 1)


def test_noise_changes_the_keep_sets_reproducibly() -> None:
    pruned = learned(TOWERS["class"], PruneSpec(cuts=((1, 0.5),), rest="drop"))
    x_BLC = tokens_at(TOWERS["class"], 1)

    def noisy(seed: int) -> torch.Tensor:
        with torch.no_grad():
            return smooth_features(pruned, x_BLC, 1, Perturb(1.0, torch.Generator().manual_seed(seed)))[0]

    assert torch.equal(noisy(0), noisy(0)) and not torch.allclose(noisy(0), noisy(1), atol=1e-3)
