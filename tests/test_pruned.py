"""pruned.py: the walk equals the dense tower where nothing is cut, and slow loops where something is."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from hypothesis import given, settings
from hypothesis import strategies as st

from patchrank.errors import UserError
from patchrank.pruned import PrunedTower, apply_cut, fold_metric, start_state
from patchrank.scorers import class_attention, token_norm
from patchrank.spec import MERGE_NORMS, RESTS, SELECTS, WHERES, PruneSpec
from patchrank.tokens import rank

POOLS = {
    "class": {},
    "registers": dict(num_prefix=3),
    "mean": dict(pool="mean", num_prefix=0, norm="after_pool"),
    "attention": dict(pool="attention", num_prefix=0, output_dim=None),
}
TOWERS = {name: make_tower(**changes) for name, changes in POOLS.items()}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))
close = dict(rtol=1e-4, atol=1e-5)
manners = st.fixed_dictionaries(
    dict(
        where=st.sampled_from(WHERES),
        rest=st.sampled_from(RESTS),
        select=st.sampled_from(SELECTS),
        merge_norm=st.sampled_from(MERGE_NORMS),
        size_bias=st.booleans(),
    )
)
layer_sets = st.sets(st.integers(0, 3), min_size=1).map(sorted)
quick = settings(max_examples=40, deadline=None)


@quick
@given(st.sampled_from(list(POOLS)), layer_sets, manners)
def test_keeping_all_patches_equals_the_dense_tower(pool: str, layers: list[int], manner: dict) -> None:
    tower = TOWERS[pool]
    pruned = PrunedTower(tower, PruneSpec(cuts=tuple((layer, 1.0) for layer in layers), **manner), token_norm)
    torch.testing.assert_close(pruned(IMAGES), tower(IMAGES), **close)


@quick
@given(st.sampled_from(list(POOLS)), layer_sets, manners)
def test_images_of_a_batch_do_not_see_each_other(pool: str, layers: list[int], manner: dict) -> None:
    cuts = tuple((layer, 0.8 - 0.15 * place) for place, layer in enumerate(layers))
    pruned = PrunedTower(TOWERS[pool], PruneSpec(cuts=cuts, **manner), token_norm)
    torch.testing.assert_close(pruned(IMAGES), torch.cat([pruned(image[None]) for image in IMAGES]), **close)


def slow_block(block, x_LC, size_L):
    """One block on one image, heads and tokens in loops, a token of size s as s equal keys."""
    h_LC = block.norm1(x_LC)
    q, k, v = block.qkv(h_LC).chunk(3, dim=-1)
    rows = []
    for i in range(len(x_LC)):
        heads = []
        for part in torch.arange(x_LC.shape[1]).chunk(block.num_heads):
            weight_L = size_L * torch.exp(k[:, part] @ q[i, part] / len(part) ** 0.5)
            heads.append((weight_L / weight_L.sum()) @ v[:, part])
        rows.append(torch.cat(heads))
    x_LC = x_LC + block.out(torch.stack(rows))
    key_LM = sum(k[:, part] for part in torch.arange(x_LC.shape[1]).chunk(block.num_heads)) / block.num_heads
    return x_LC, key_LM


def slow_walk(tower, spec: PruneSpec, image_CHW, score_N):
    """One image through a class-token tower: every block on the tokens that are there, one cut, plain loops."""
    (layer, K), *_ = spec.counts(16)
    x_LC, size_L = tower.embed(image_CHW[None])[0], torch.ones(17)
    for index, block in enumerate(tower.blocks):
        if index == layer and spec.where == "before":
            x_LC, size_L = slow_cut(spec, x_LC, size_L, slow_block(block, x_LC, size_L)[1], K, score_N)
        x_LC, key_LM = slow_block(block, x_LC, size_L if spec.size_bias else torch.ones_like(size_L))
        if index == layer and spec.where == "inside":
            x_LC, size_L = slow_cut(spec, x_LC, size_L, key_LM, K, score_N)
        x_LC = block.mlp(x_LC)
    return tower.proj(tower.norm(x_LC[0]))


def slow_cut(spec: PruneSpec, x_LC, size_L, key_LM, K: int, score_N):
    order = sorted(range(16), key=lambda index: (-score_N[index].item(), index))
    keep, rest = order[:K], order[K:]
    if spec.rest == "drop":
        chosen = [0, *(1 + index for index in keep)]
        return x_LC[chosen], size_L[chosen]
    guests = {index: [] for index in keep}
    for index in rest:
        nearest = [F.cosine_similarity(key_LM[1 + index], key_LM[1 + host], dim=0).item() for host in keep]
        guests[keep[nearest.index(max(nearest))]].append(index)
    tokens, sizes = [x_LC[0]], [1.0]
    for host in keep:
        members_MC = x_LC[[1 + host, *(1 + guest for guest in guests[host])]]
        mean_C = members_MC.mean(0)
        if spec.merge_norm == "preserve":
            mean_C = mean_C / mean_C.norm() * members_MC.norm(dim=1).mean()
        tokens.append(mean_C)
        sizes.append(float(len(members_MC)))
    return torch.stack(tokens), torch.tensor(sizes)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(1, 16), manners, st.integers(0, 10_000))
def test_one_cut_equals_the_slow_walk(layer: int, K: int, manner: dict, seed: int) -> None:
    if manner["where"] == "inside" and layer == 3:
        return  # the last block computes the class row only: nothing is left for a cut inside it (next test)
    tower = TOWERS["class"]
    spec = PruneSpec(cuts=((layer, K / 16),), **(manner | dict(select="topk")))
    score_BN = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed))
    found = PrunedTower(tower, spec, None)(IMAGES[:1], score_BN)[0]
    torch.testing.assert_close(found, slow_walk(tower, spec, IMAGES[0], score_BN[0]), rtol=1e-3, atol=1e-4)


def test_pooling_counts_patches_with_or_without_the_bias_in_attention() -> None:
    """A cut behind all attention: what is left of the sizes is the pooling's."""

    def features(pool: str, size_bias: bool, **spec) -> torch.Tensor:
        return PrunedTower(TOWERS[pool], PruneSpec(size_bias=size_bias, **spec), token_norm)(IMAGES)

    for pool in ("mean", "attention"):
        late = dict(cuts=((3, 0.25),), where="inside")
        assert torch.equal(features(pool, True, **late), features(pool, False, **late))
    for pool in POOLS:
        early = dict(cuts=((1, 0.25),))
        assert not torch.allclose(features(pool, True, **early), features(pool, False, **early), rtol=1e-3)


def test_a_cut_inside_the_last_block_of_a_class_token_tower_changes_nothing() -> None:
    tower = TOWERS["class"]
    pruned = PrunedTower(tower, PruneSpec(cuts=((3, 0.3),), where="inside"), token_norm)
    torch.testing.assert_close(pruned(IMAGES), tower(IMAGES), **close)


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("pool", POOLS)
def test_the_feature_does_not_depend_on_the_order_of_what_is_kept(pool: str, rest: str) -> None:
    tower, spec = TOWERS[pool], PruneSpec(cuts=((2, 0.5),), rest=rest)
    high, low = torch.rand(3, 8) + 1, torch.rand(3, 8)
    first = PrunedTower(tower, spec, None)(IMAGES, torch.cat([high, low], dim=1))
    second = PrunedTower(tower, spec, None)(IMAGES, torch.cat([high.flip(1), low.flip(1)], dim=1))
    torch.testing.assert_close(first, second, **close)


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("select", SELECTS)
def test_several_cuts_carry_positions_and_sizes(where: str, select: str) -> None:
    tower = TOWERS["mean"]
    seen = []

    def scorer(state):
        seen.append(state)
        return state.position_BN.float()

    spec = PruneSpec(cuts=((0, 0.75), (2, 0.5), (3, 0.25)), where=where, select=select)
    pruned = PrunedTower(tower, spec, scorer)
    state, cuts = pruned.tokens(IMAGES)
    assert [part.position_BN.shape[1] for part in [*seen, state]] == [16, 12, 8, 4]
    assert [part.block for part in seen] == [tower.blocks[layer] for layer in (0, 2, 3)]
    torch.testing.assert_close(state.size_BN.sum(1), torch.full((3,), 16.0))
    if select == "topk":  # the scorer prefers high positions
        assert all(sorted(row) == [12, 13, 14, 15] for row in state.position_BN.tolist())
    unfolded_BNC = pruned.unfold(state.patches_BNC, cuts)
    assert unfolded_BNC.shape == (3, 16, 32)
    at_home = unfolded_BNC.gather(1, state.position_BN.unsqueeze(-1).expand(-1, -1, 32))
    assert torch.equal(at_home, state.patches_BNC)


def test_unfold_gives_every_host_as_many_places_as_its_size() -> None:
    pruned = PrunedTower(TOWERS["class"], PruneSpec(cuts=((1, 0.5), (2, 0.25))), token_norm)
    state, cuts = pruned.tokens(IMAGES)
    places_BN = pruned.unfold(torch.arange(4.0).expand(3, -1).unsqueeze(-1), cuts).squeeze(-1).long()
    for b in range(3):
        assert torch.bincount(places_BN[b], minlength=4).tolist() == state.size_BN[b].tolist()


def test_unfold_refuses_dropped_patches() -> None:
    pruned = PrunedTower(TOWERS["class"], PruneSpec(cuts=((1, 0.5),), rest="drop"), token_norm)
    state, cuts = pruned.tokens(IMAGES)
    with pytest.raises(ValueError, match="rest='fold'"):
        pruned.unfold(state.patches_BNC, cuts)


def test_a_golden_score_rules_the_first_cut_only() -> None:
    spec = PruneSpec(cuts=((1, 0.5), (2, 0.25)), rest="drop")
    golden_BN = torch.arange(16.0).expand(3, -1)
    asked = []

    def scorer(state):
        asked.append(state.position_BN)
        return -state.position_BN.float()

    state, _ = PrunedTower(TOWERS["class"], spec, scorer).tokens(IMAGES, golden_BN)
    assert len(asked) == 1 and sorted(asked[0][0].tolist()) == list(range(8, 16))
    assert state.position_BN[0].tolist() == [8, 9, 10, 11]


class Summary(torch.nn.Module):
    """One added token: a learned map of the mean patch."""

    def __init__(self) -> None:
        super().__init__()
        self.map = torch.nn.Linear(32, 32)

    def forward(self, state, score_BN, K):
        return self.map(state.patches_BNC.mean(1, keepdim=True))


@pytest.mark.parametrize("pool", POOLS)
def test_added_tokens_join_once_and_stay_in_the_prefix(pool: str) -> None:
    tower = TOWERS[pool]
    pruned = PrunedTower(tower, PruneSpec(cuts=((1, 0.5), (3, 0.25)), num_added=1), token_norm, Summary())
    state, _ = pruned.tokens(IMAGES)
    assert state.num_prefix == tower.config.num_prefix + 1
    assert state.patches_BNC.shape[1] == 4
    assert pruned(IMAGES).shape == (3, tower.config.feature_dim)


class TokenScorer(torch.nn.Module):
    """A learned score per patch."""

    def __init__(self) -> None:
        super().__init__()
        self.map = torch.nn.Linear(32, 1)

    def forward(self, state):
        return self.map(state.patches_BNC).squeeze(-1)


def test_a_training_step_of_scorer_and_added_tokens_leaves_the_tower_bit_identical() -> None:
    tower, scorer, added = make_tower(), TokenScorer(), Summary()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    learned_before = [parameter.clone() for parameter in (*scorer.parameters(), *added.parameters())]
    pruned = PrunedTower(tower, PruneSpec(cuts=((1, 0.5),), num_added=1), scorer, added)
    optimiser = torch.optim.SGD([p for p in pruned.parameters() if p.requires_grad], lr=0.1)
    state = start_state(tower, tower.run(tower.embed(IMAGES), 0, 1), 1)
    loss = (pruned(IMAGES) - tower(IMAGES)).square().mean() + scorer(state).square().mean()
    loss.backward()
    optimiser.step()
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    learned = (*scorer.parameters(), *added.parameters())
    assert all(not torch.equal(after, old) for after, old in zip(learned, learned_before, strict=True))


def test_apply_cut_says_what_it_did() -> None:
    tower = TOWERS["class"]
    state = start_state(tower, tower.embed(IMAGES), 0)
    order_BN = rank(class_attention(state))
    after, cut = apply_cut(state, order_BN, 5, PruneSpec(cuts=((0, 5 / 16),)), fold_metric(state))
    assert torch.equal(torch.cat([cut.keep_BK, cut.rest_BR], dim=1), order_BN)
    assert torch.equal(after.position_BN, cut.keep_BK)
    counts_BK = F.one_hot(cut.assign_BR, 5).sum(1) + 1
    assert torch.equal(after.size_BN, counts_BK.float())


def test_a_cut_outside_the_tower_is_refused() -> None:
    with pytest.raises(UserError, match="outside this tower of 4 blocks"):
        PrunedTower(TOWERS["class"], PruneSpec(cuts=((4, 0.5),)), token_norm)
