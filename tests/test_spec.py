"""spec.py: the rules of a PruneSpec, its JSON form, and the text form of cuts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchrank.errors import UserError
from patchrank.spec import MERGE_NORMS, RESTS, SELECTS, WHERES, PruneSpec, parse_cuts


@st.composite
def specs(draw) -> PruneSpec:
    layers = sorted(draw(st.sets(st.integers(0, 23), min_size=0, max_size=4)))
    keeps = sorted(draw(st.lists(st.floats(0.01, 1.0), min_size=len(layers), max_size=len(layers))), reverse=True)
    return PruneSpec(
        cuts=tuple(zip(layers, keeps)),
        where=draw(st.sampled_from(WHERES)),
        rest=draw(st.sampled_from(RESTS)),
        select=draw(st.sampled_from(SELECTS)),
        merge_norm=draw(st.sampled_from(MERGE_NORMS)),
        num_added=draw(st.integers(0, 4)),
    )


@given(specs())
def test_json_gives_the_same_spec_back(spec: PruneSpec) -> None:
    assert PruneSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert hash(PruneSpec.from_dict(spec.to_dict())) == hash(spec)


@given(specs(), st.integers(1, 600))
def test_counts_never_rise_and_stay_in_range(spec: PruneSpec, num_patches: int) -> None:
    counts = [K for _, K in spec.counts(num_patches)]
    assert counts == sorted(counts, reverse=True)
    assert all(1 <= K <= num_patches for K in counts)


@pytest.mark.parametrize(
    "values, word",
    [
        (dict(cuts=((3, 0.0),)), "keep=0"),
        (dict(cuts=((3, 1.2),)), "keep=1.2"),
        (dict(cuts=((3, float("nan")),)), "keep=nan"),
        (dict(cuts=((-1, 0.5),)), "layer"),
        (dict(cuts=((3, 0.5), (3, 0.4))), "must rise"),
        (dict(cuts=((5, 0.5), (3, 0.4))), "must rise"),
        (dict(cuts=((3, 0.5), (5, 0.6))), "cannot exceed"),
        (dict(cuts=((3, 0.5),), rest="keep"), "fold, drop"),
        (dict(cuts=((3, 0.5),), select="best"), "suppress, cover, topk"),
        (dict(cuts=((3, 0.5),), where="after"), "before, inside"),
        (dict(cuts=((3, 0.5),), merge_norm="sum"), "preserve, mean"),
        (dict(cuts=((3, 0.5),), num_added=-1), "num_added=-1"),
    ],
)
def test_values_outside_their_rule_are_named(values: dict, word: str) -> None:
    with pytest.raises(UserError, match=word) as raised:
        PruneSpec(**values)
    assert "\n" not in str(raised.value)


def test_layers_outside_the_tower_are_refused() -> None:
    PruneSpec(cuts=((11, 0.5),)).check_layers(12)
    with pytest.raises(UserError, match="use 0 to 11"):
        PruneSpec(cuts=((12, 0.5),)).check_layers(12)


def test_with_keep_changes_one_cut_only() -> None:
    spec = PruneSpec(cuts=((3, 1.0),), rest="drop")
    assert spec.with_keep(0.4) == PruneSpec(cuts=((3, 0.4),), rest="drop")
    with pytest.raises(ValueError, match="one cut"):
        PruneSpec(cuts=((3, 0.5), (4, 0.4))).with_keep(0.3)


@given(st.integers(1, 600).flatmap(lambda N: st.tuples(st.integers(1, N), st.just(N))))
def test_a_count_in_cuts_is_that_count(pair) -> None:
    K, N = pair
    assert PruneSpec(cuts=parse_cuts(f"3:{K}", N)).counts(N) == [(3, K)]


def test_cuts_take_counts_and_ratios_together() -> None:
    assert parse_cuts("3:156,5:0.5", 196) == ((3, 156 / 196), (5, 0.5))


@pytest.mark.parametrize("text", ["", "3", "3:", "a:5", "3:b", "3:0", "3:197", "3:5;4:4", "3:5,"])
def test_cuts_in_another_form_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--cuts"):
        parse_cuts(text, 196)
