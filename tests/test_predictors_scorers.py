"""predictors: every learned scorer and every kind of added token, by table; shape, cost, what it may depend on."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from torch.utils.flop_counter import FlopCounterMode

from patchrank.errors import UserError
from patchrank.macs import dense_macs, pruned_macs
from patchrank.presets import spec_for_macs
from patchrank.pruned import PrunedTower, State, apply_cut, start_state
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig, VisionTower
from predictors.costs import scorer_macs
from predictors.scorers import normalised, standardise
from predictors.tables import COMPENSATION, PREDICTORS, build_added, build_scorer, scorer_options

EXTRA = {"text-similarity": {"feature_dim": 24, "num_classes": 5}}
POOLS = {"class": {}, "registers": dict(num_prefix=3), "mean": dict(pool="mean", num_prefix=0, norm="after_pool")}
TOWERS = {name: make_tower(**changes) for name, changes in POOLS.items()}
REAL = {
    "embedded": dict(image_size=(112, 112), patch_size=8, width=96, num_layers=6, num_heads=3, mlp_width=384),
    "ViT-Ti/16": dict(image_size=(224, 224), patch_size=16, width=192, num_layers=12, num_heads=3, mlp_width=768),
    "ViT-B/16": dict(image_size=(224, 224), patch_size=16, width=768, num_layers=12, num_heads=12, mlp_width=3072),
    "ViT-B/32": dict(image_size=(224, 224), patch_size=32, width=768, num_layers=12, num_heads=12, mlp_width=3072),
}


def scorer_of(name: str, tower: VisionTower, **options):
    torch.manual_seed(1)
    scorer = build_scorer(name, tower.config, **EXTRA.get(name, {}), **options)
    if hasattr(scorer, "class_DY"):
        scorer.start_from(tower, torch.randn(24, 5))
    return scorer


def state_of(tower: VisionTower, images) -> State:
    return start_state(tower, tower.run(tower.embed(images), 0, 1), 1)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", PREDICTORS)
def test_scores_have_one_number_for_every_patch_and_differ(name: str, pool: str, images) -> None:
    tower = TOWERS[pool]
    score_BN = scorer_of(name, tower)(state_of(tower, images))
    assert score_BN.shape == (3, 16) and score_BN.dtype == torch.float32
    assert score_BN.std(-1).min() > 1e-3 and not torch.equal(score_BN[0], score_BN[1])


@pytest.mark.parametrize("name", PREDICTORS)
def test_scores_do_not_depend_on_other_images(name: str, images) -> None:
    tower = TOWERS["class"]
    scorer = scorer_of(name, tower)
    together_BN = scorer(state_of(tower, images))
    alone_BN = torch.cat([scorer(state_of(tower, image[None])) for image in images])
    torch.testing.assert_close(together_BN, alone_BN, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "mlp", "text-similarity"])
def test_scores_belong_to_patches_not_to_places_in_the_sequence(name: str, images) -> None:
    """Behind a first cut the patches stand in score order; the score of a patch must not change with it."""
    tower = TOWERS["class"]
    scorer = scorer_of(name, tower)
    with torch.no_grad():
        scorer.prior_G.normal_(generator=torch.Generator().manual_seed(2))
    state = state_of(tower, images)
    order_N = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    moved = replace(
        state,
        x_BLC=torch.cat([state.x_BLC[:, :1], state.patches_BNC[:, order_N]], dim=1),
        position_BN=state.position_BN[:, order_N],
    )
    torch.testing.assert_close(scorer(moved), scorer(state)[:, order_N], rtol=1e-4, atol=1e-5)


def test_the_context_counts_a_folded_patch_as_often_as_its_size(images) -> None:
    tower = TOWERS["mean"]
    scorer = scorer_of("mlp", tower)
    state = state_of(tower, images)
    twice = replace(
        state,
        x_BLC=torch.cat([state.x_BLC, state.x_BLC[:, :1]], dim=1),
        position_BN=torch.cat([state.position_BN, state.position_BN[:, :1]], dim=1),
    )
    sized = replace(state, size_BN=torch.tensor([2.0] + 15 * [1.0]).expand(3, -1))
    torch.testing.assert_close(scorer(twice)[:, :16], scorer(sized), rtol=1e-4, atol=1e-5)


def test_the_mixer_refuses_a_second_cut(images) -> None:
    tower = TOWERS["class"]
    pruned = PrunedTower(tower, PruneSpec(cuts=((1, 0.5), (2, 0.25))), scorer_of("mixer", tower))
    with pytest.raises(ValueError, match="use one cut, or linear or mlp"):
        pruned(images)


def on_meta(build):
    with torch.device("meta"):
        return build().requires_grad_(False)


META = on_meta(lambda: VisionTower(TOWERS["class"].config)).eval()
IMAGE = torch.empty(1, 3, 32, 32, device="meta")


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("metric_dim", [0, 5])
@pytest.mark.parametrize("name", PREDICTORS)
def test_closed_form_macs_equal_the_counter(name: str, metric_dim: int) -> None:
    tower = TOWERS["class"]
    cuts = ((1, 0.5),) if name == "mixer" else ((1, 0.75), (2, 0.5), (3, 0.25))
    for rest, select in (("fold", "suppress"), ("drop", "topk")):
        spec = PruneSpec(cuts=cuts, rest=rest, select=select)
        scorer = on_meta(lambda: build_scorer(name, tower.config, **EXTRA.get(name, {}), metric_dim=metric_dim))
        formula = pruned_macs(
            tower.config, spec, scorer=scorer_macs(scorer, tower.config, spec), metric_dim=metric_dim or None
        )
        pruned = PrunedTower(META, spec, scorer)
        assert formula == counted(lambda pruned=pruned: pruned(IMAGE)), spec


@pytest.mark.parametrize("model", REAL)
@pytest.mark.parametrize("name", PREDICTORS)
def test_scorers_cost_at_most_one_percent(name: str, model: str) -> None:
    """All calls together; with the `accurate` schedule where a scorer can serve it."""
    config = TowerConfig(**REAL[model], output_dim=512 if model.startswith("ViT-B") else None)
    options = {"feature_dim": config.feature_dim, "num_classes": 100} if name == "text-similarity" else {}
    with torch.device("meta"):
        scorer = build_scorer(name, config, **options)
    several = name in ("linear", "mlp")
    spec = spec_for_macs(config, 0.6) if several else PruneSpec(cuts=((config.num_layers // 4, 0.6),))
    limit = 0.03 if name == "text-similarity" else 0.01  # a map into the feature space is not small in small towers
    assert 0 < scorer_macs(scorer, config, spec) <= limit * dense_macs(config)


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_metric_of_its_own_decides_about_nearness(name: str, images) -> None:
    tower = TOWERS["class"]
    scorer = scorer_of(name, tower, metric_dim=5)
    pruned = PrunedTower(tower, PruneSpec(cuts=((1, 0.5),), select="suppress"), scorer)
    state = state_of(tower, images)
    assert torch.equal(pruned.nearness(state), scorer.metric(state)) and scorer.metric(state).shape == (3, 16, 5)
    before_BD = pruned(images)
    with torch.no_grad():
        scorer.project.weight.copy_(torch.randn(5, 32, generator=torch.Generator().manual_seed(9)))
    assert not torch.allclose(before_BD, pruned(images))


def test_a_given_metric_stands_before_the_scorers_own(images) -> None:
    tower = TOWERS["class"]
    scorer = scorer_of("mlp", tower, metric_dim=5)
    spec = PruneSpec(cuts=((1, 0.5),), where="inside")
    by_position = PrunedTower(tower, spec, scorer, metric=lambda state: state.position_BN[..., None] - 7.5)
    assert by_position.nearness(state_of(tower, images)).shape == (3, 16, 1)
    assert not torch.allclose(by_position(images), PrunedTower(tower, spec, scorer)(images))


@pytest.mark.parametrize("merge_norm", ["mean", "preserve"])
def test_merge_weights_count_beside_sizes(merge_norm: str, images) -> None:
    """A weight of two is a patch that stands there twice, except in the sizes."""
    state = replace(state_of(TOWERS["mean"], images), size_BN=torch.arange(1.0, 17.0).expand(3, -1))
    order_BN = torch.arange(16).expand(3, -1)
    metric_BNM = torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(0))
    weight_BN = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) + 0.5
    spec = PruneSpec(cuts=((1, 0.4),), merge_norm=merge_norm)
    weighted, _ = apply_cut(state, order_BN, 6, spec, metric_BNM, weight_BN=weight_BN)
    sized = replace(state, size_BN=state.size_BN * weight_BN)
    torch.testing.assert_close(weighted.x_BLC, apply_cut(sized, order_BN, 6, spec, metric_BNM)[0].x_BLC)
    assert torch.equal(weighted.size_BN, apply_cut(state, order_BN, 6, spec, metric_BNM)[0].size_BN)


def test_merge_weights_start_alike_and_follow_the_score(images) -> None:
    tower, spec = TOWERS["class"], PruneSpec(cuts=((1, 0.5), (2, 0.3)), select="suppress")
    torch.manual_seed(1)
    weighted, plain = (build_scorer("mlp", tower.config, weighted=weighted) for weighted in (True, False))
    plain.load_state_dict(weighted.state_dict(), strict=False)
    torch.testing.assert_close(PrunedTower(tower, spec, weighted)(images), PrunedTower(tower, spec, plain)(images))
    torch.nn.init.constant_(weighted.sharpness, 1.0)
    assert not torch.allclose(PrunedTower(tower, spec, weighted)(images), PrunedTower(tower, spec, plain)(images))
    weight_BN = weighted.merge_weight(torch.arange(5.0).unsqueeze(0))
    assert (weight_BN.diff() > 0).all() and (weight_BN > 0).all()


@pytest.mark.parametrize("metric_dim", [8, 32, 40])
def test_a_metric_starts_as_the_strongest_directions_of_tokens(metric_dim: int, images) -> None:
    tower = TOWERS["class"]
    state = state_of(tower, images)
    unit_BNC = F.normalize(normalised(state.patches_BNC), dim=-1)
    scorer = build_scorer("linear", tower.config, metric_dim=metric_dim)
    scorer.start_from_tokens(state.patches_BNC)
    seen_BNM = scorer.metric(state)
    if metric_dim >= 32:
        own_BNM = F.normalize(seen_BNM, dim=-1)
        torch.testing.assert_close(own_BNM @ own_BNM.mT, unit_BNC @ unit_BNC.mT, rtol=0, atol=1e-4)
    energy = torch.linalg.svdvals(unit_BNC.flatten(0, 1)).square()
    share = (seen_BNM / normalised(state.patches_BNC).norm(dim=-1, keepdim=True)).square().sum() / energy.sum()
    torch.testing.assert_close(share, energy[:metric_dim].sum() / energy.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["before", "inside"])
@pytest.mark.parametrize("name", ["linear", "mlp", "mixer"])
def test_a_salient_scorer_adds_a_power_of_the_class_attention(name: str, where: str, images) -> None:
    """Against attention computed the long way, in the block that the cut stands before or in."""
    tower = TOWERS["registers"]
    salient, plain = scorer_of(name, tower, salient=True), scorer_of(name, tower)
    plain.load_state_dict(salient.state_dict(), strict=False)
    spec, seen = PruneSpec(cuts=((1, 0.5),), where=where), []

    def watch(state: State) -> torch.Tensor:
        seen.append(state)
        return salient(state)

    PrunedTower(tower, spec, watch)(images)
    block, state = tower.blocks[1], seen[0]
    x_BLC = tower.run(tower.embed(images), 0, 1)
    q, k, _ = (F.linear(block.norm1(x_BLC), block.qkv.weight, block.qkv.bias)).chunk(3, dim=-1)
    q, k = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in (q[:, :1], k[:, 3:]))
    share_BN = (q @ k.mT * 8**-0.5).softmax(-1).mean(1).squeeze(1)
    torch.testing.assert_close(salient(state) - plain(state), 0.4 * share_BN.log(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("where", ["before", "inside"])
def test_saliency_costs_what_it_says(where: str) -> None:
    spec = PruneSpec(cuts=((1, 0.75), (2, 0.5)), where=where, select="cover")
    scorer = on_meta(lambda: build_scorer("linear", META.config, salient=True, metric_dim=5))
    formula = pruned_macs(META.config, spec, scorer=scorer_macs(scorer, META.config, spec), metric_dim=5)
    assert formula == counted(lambda: PrunedTower(META, spec, scorer)(IMAGE))


@pytest.mark.parametrize("num_added", [1, 3])
@pytest.mark.parametrize("name", COMPENSATION)
def test_added_tokens_join_and_cost_what_they_say(name: str, num_added: int, images) -> None:
    tower, config = TOWERS["class"], TOWERS["class"].config
    spec = PruneSpec(cuts=((1, 0.75), (2, 0.5)), num_added=num_added)
    added = build_added(name, config, num_added=num_added)
    state, _ = PrunedTower(tower, spec, scorer_of("mlp", tower), added).tokens(images)
    assert state.num_prefix == 1 + num_added
    added = on_meta(lambda: build_added(name, config, num_added=num_added))
    scorer = on_meta(lambda: build_scorer("mlp", config))
    pruned = PrunedTower(META, spec, scorer, added)
    cost = scorer_macs(scorer, config, spec) + added.macs(16, 12)
    assert pruned_macs(config, spec, scorer=cost) == counted(lambda: pruned(IMAGE))


def test_summary_tokens_see_the_rest_and_nothing_else(images) -> None:
    tower = TOWERS["class"]
    torch.manual_seed(0)
    added = build_added("summary", tower.config, num_added=2)
    state, score_BN = state_of(tower, images), torch.arange(16.0).expand(3, -1)
    token_BTC = added(state, score_BN, 12)
    rest_BC = state.patches_BNC[:, :4].mean(1)
    torch.testing.assert_close(token_BTC[:, 0], rest_BC, rtol=0.2, atol=0.2)  # queries start near zero
    changed = replace(state, x_BLC=torch.cat([state.x_BLC[:, :5], torch.randn(3, 12, 32)], dim=1))
    torch.testing.assert_close(added(changed, score_BN, 12), token_BTC)
    assert torch.equal(added(state, score_BN, 16), added.token_TC.expand(3, -1, -1))


def test_unknown_rows_list_the_known_ones() -> None:
    config = TOWERS["class"].config
    with pytest.raises(UserError, match="--scorer psychic: unknown; choose one of linear, mlp, mixer"):
        build_scorer("psychic", config)
    with pytest.raises(UserError, match="--added psychic: unknown; choose one of static, summary"):
        build_added("psychic", config)


def test_options_are_what_the_builder_needs() -> None:
    config = TOWERS["mean"].config
    assert scorer_options(config, hidden=3) == {"width": 32, "has_class": False, "hidden": 3}


def test_standardised_scores_know_neither_scale_nor_offset() -> None:
    score_BN = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    z_BN = standardise(score_BN)
    torch.testing.assert_close(standardise(5 * score_BN - 3), z_BN)
    torch.testing.assert_close(z_BN.mean(-1), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(z_BN.square().mean(-1), torch.ones(4))
    assert torch.isfinite(standardise(torch.ones(2, 5))).all()
