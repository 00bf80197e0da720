"""Presets meet their budget from below, and exactly one way of saying how much is pruned is accepted."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchrank.adapters import hf_models
from patchrank.errors import UserError
from patchrank.macs import dense_macs, pruned_macs
from patchrank.presets import low_latency, one_cut, resolve_spec, schedule, spec_for_macs, spread_cuts
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig


def vit(size: int, patch: int, width: int, depth: int, **changes) -> TowerConfig:
    options = dict(num_heads=width // 64, mlp_width=4 * width, output_dim=512) | changes
    return TowerConfig(image_size=(size, size), patch_size=patch, width=width, num_layers=depth, **options)


TOWERS = {
    "ViT-Ti/16": vit(224, 16, 192, 12, output_dim=None),
    "ViT-B/32": vit(224, 32, 768, 12),
    "ViT-B/16": vit(224, 16, 768, 12),
    "ViT-L/14": vit(224, 14, 1024, 24),
    "SigLIP-B/16-384": vit(384, 16, 768, 12, num_prefix=0, pool="attention", output_dim=None),
}
SMALL = vit(32, 8, 64, 4)


@pytest.mark.parametrize("rest", ["fold", "drop"])
@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS)
@pytest.mark.parametrize(
    ("preset", "macs"),
    [(spec_for_macs, 0.7), (spec_for_macs, 0.56), (low_latency, 0.7), (low_latency, 0.56), (low_latency, 0.45)],
)
def test_budget_is_met_within_one_percent_from_below(preset, macs: float, config: TowerConfig, rest: str) -> None:
    spec = preset(config, macs, rest=rest)
    share = pruned_macs(config, spec) / dense_macs(config)
    # One patch of B/32's 49 alone is up to 1.5 % of its tower.
    assert macs - max(0.01 * macs, 0.75 / config.num_patches) <= share <= macs
    assert spec.rest == rest and spec.select == "suppress" and spec.merge_norm == "preserve"


def test_hugging_face_cost_rules_its_own_budget() -> None:
    for config in TOWERS.values():
        spec = spec_for_macs(config, 0.7, cost=hf_models.cost)
        dense = hf_models.cost(config, PruneSpec(cuts=()))
        assert dense == dense_macs(config, class_row_only=False)
        assert (0.7 - max(0.007, 0.75 / config.num_patches)) * dense <= hf_models.cost(config, spec) <= 0.7 * dense


def test_accurate_keeps_equal_shares_inside_the_scheduled_blocks() -> None:
    spec = spec_for_macs(TOWERS["ViT-B/16"], 0.6)
    counts = [196, *(K for _, K in spec.counts(196))]
    assert [layer for layer, _ in spec.cuts] == [2, 3, 4, 5, 6, 7, 8, 9] and spec.where == "inside"
    share = (counts[-1] / 196) ** (1 / 8)
    assert all(abs(after - 196 * share**place) <= 1 for place, after in enumerate(counts))


def test_low_latency_is_one_cut_at_the_layer_asked_for() -> None:
    config = TOWERS["ViT-B/16"]
    assert [layer for layer, _ in low_latency(config, 0.7).cuts] == [3]
    assert [layer for layer, _ in low_latency(config, 0.7, layer=2).cuts] == [2]


@given(num_layers=st.integers(1, 48))
def test_schedule_fits_every_depth(num_layers: int) -> None:
    layers = schedule(num_layers)
    assert list(layers) == sorted(set(layers)) and 1 <= len(layers) <= 8
    if num_layers > 2:
        assert layers[0] >= 1 and layers[-1] <= num_layers - 2, "neither raw patches nor a block of one row"
    if num_layers % 12 == 0:
        assert layers[0] == num_layers // 6 and layers[-1] == 3 * num_layers // 4


@given(share=st.floats(0.01, 1.0), size=st.integers(1, 20))
def test_spread_cuts_keep_the_share_at_every_cut(share: float, size: int) -> None:
    config = vit(16 * size, 16, 192, 12)
    counts = dict(spread_cuts(config, share).counts(size**2))
    left = [size**2]
    for place, layer in enumerate(schedule(12), start=1):
        expected = max(1, round(size**2 * share**place))
        assert abs(counts.get(layer, left[-1]) - expected) <= 1
        left.append(counts.get(layer, left[-1]))
    assert all(before > after for before, after in pairwise([size**2, *counts.values()]))


@given(macs=st.floats(0.5, 1.0))
def test_more_budget_never_keeps_fewer_patches(macs: float) -> None:
    config = TOWERS["ViT-Ti/16"]
    left = [dict(spec_for_macs(config, share).counts(196) or [(0, 196)]) for share in (macs, min(1.0, macs + 0.05))]
    assert min(left[0].values()) <= min(left[1].values())


def test_the_whole_budget_prunes_nothing() -> None:
    assert spec_for_macs(SMALL, 1.0).cuts == ()
    assert low_latency(SMALL, 1.0).cuts == ()


@pytest.mark.parametrize("macs", [0.05, 0.0, -1.0, 1.2, float("nan")])
@pytest.mark.parametrize("preset", [spec_for_macs, low_latency])
def test_budgets_out_of_reach_name_the_range(preset, macs: float) -> None:
    config = TOWERS["ViT-B/16"]
    with pytest.raises(UserError, match=rf"macs={macs:g}: .*reaches 0\.\d+ to 1") as caught:
        preset(config, macs)
    lowest = float(str(caught.value).split("reaches ")[1].split()[0])
    assert preset(config, lowest).cuts, "the named end of the range must be reachable"


def test_keep_is_one_cut_at_a_quarter_of_the_depth() -> None:
    config = TOWERS["ViT-B/16"]
    assert resolve_spec(config, keep=0.6).counts(196) == [(3, 118)]
    assert resolve_spec(config, keep=0.6, layer=5).cuts == ((5, 0.6),)
    assert resolve_spec(config, keep=0.6, rest="drop").rest == "drop"
    assert resolve_spec(config, keep=0.6).rest == "fold"


def test_cuts_and_spec_are_taken_as_they_are() -> None:
    spec = PruneSpec(cuts=((2, 0.5),), rest="drop", select="topk", merge_norm="mean")
    assert resolve_spec(SMALL, spec=spec) is spec
    assert resolve_spec(SMALL, cuts=((1, 0.8), (2, 0.5))).cuts == ((1, 0.8), (2, 0.5))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "nothing given.*exactly one of"),
        ({"keep": 0.6, "macs": 0.7}, "macs and keep given"),
        ({"spec": PruneSpec(cuts=()), "cuts": ((1, 0.5),)}, "cuts and spec given"),
        ({"macs": 0.9, "layer": 3}, "layer=3: goes with keep only"),
        ({"spec": PruneSpec(cuts=()), "rest": "drop"}, "rest='drop'.*already"),
        ({"spec": PruneSpec(cuts=((4, 0.5),))}, "layer=4: outside"),
        ({"cuts": ((9, 0.5),)}, "layer=9: outside"),
        ({"keep": 0.5, "layer": 4}, "layer=4: outside"),
        ({"keep": 0.5, "layer": -1}, "layer=-1: outside"),
        ({"keep": 0.0}, "keep=0: must lie in"),
        ({"keep": 1.5}, "keep=1.5: must lie in"),
        ({"keep": 0.5, "rest": "forget"}, "rest='forget': unknown; choose one of fold, drop"),
    ],
)
def test_mistakes_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_spec(SMALL, **arguments)


def test_one_cut_keeps_everything_at_one() -> None:
    assert one_cut(SMALL, 1.0).counts(16) == [(1, 16)]
