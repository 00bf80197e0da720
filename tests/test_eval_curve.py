"""`python -m eval curve`: families, budgets, rows, picture, refusals."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import make_tower
from test_apply import open_clip_model
from test_predictors_train import draw, model  # noqa: F401 (fixtures)

import patchrank
from eval import trained
from eval.curve import FAMILIES, CurveConfig, families, main, make_entries, spread
from patchrank.adapters import open_clip_models
from patchrank.errors import UserError
from patchrank.macs import dense_macs, pruned_macs
from patchrank.salient import Salient, salient_cost
from predictors.schedule import selection


@pytest.fixture
def config(model, tmp_path) -> CurveConfig:  # noqa: F811
    draw(tmp_path / "data", 8)
    data = dict(data="folder", data_root=tmp_path / "data", split="all", limit=6, batch_size=4, threads=1)
    return CurveConfig(model=str(model), macs=(0.8, 0.65), time_batches=1, out=tmp_path / "out", **data)


def test_families_stand_where_they_say() -> None:
    config = make_tower(num_layers=12).config
    found = families(config, selection(config, "fold")[0])
    assert found.keys() == FAMILIES.keys()
    layers = {
        (family, x): [layer for layer, _ in spec.cuts] for family, part in found.items() for x, spec in part.items()
    }
    assert layers["one cut", 5] == [5] and layers["first", 3] == [3, 4, 5, 6, 7, 8, 9]
    assert layers["number", 1] == [2] and layers["number", 2] == [2, 9] and layers["number", 8] == list(range(2, 10))
    assert all(len(layers["number", num]) == num for num in range(1, 9))
    wheres = {family: {spec.where for spec in part.values()} for family, part in found.items()}
    assert wheres == {"one cut": {"before"}, "number": {"inside"}, "first": {"inside"}}


@pytest.mark.parametrize("num", range(1, 9))
def test_spread_blocks_are_distinct_and_rise(num: int) -> None:
    layers = spread(range(2, 10), num)
    assert layers == sorted(set(layers)) and len(layers) == num and layers[0] == 2 and (num == 1 or layers[-1] == 9)


@pytest.mark.parametrize("rest", ["fold", "drop"])
def test_entries_meet_their_budgets(rest: str) -> None:
    tower = make_tower(image_size=(96, 96), num_layers=8)
    places, entries = make_entries(tower, (0.8, 0.6), rest)
    cost = salient_cost(pruned_macs)
    for entry in entries:
        assert entry.image_macs == cost(tower.config, entry.spec) <= entry.budget * dense_macs(tower.config)
        assert entry.spec.rest == rest and isinstance(entry.run.scorer, Salient) and entry.method in places
    assert {places[entry.method]["curve"] for entry in entries} == set(FAMILIES)
    assert len({(entry.method, entry.budget) for entry in entries}) == len(entries)


def test_a_run_leaves_rows_and_a_picture_and_a_second_measures_nothing(config, monkeypatch, capsys) -> None:
    main(config)
    found = json.loads((config.out / "curve.json").read_text())
    assert {row["curve"] for row in found["rows"]} == set(FAMILIES) and found["num_images"] == 6
    for row in found["rows"]:
        assert row["ms_batch16"] > 0 and row["dense_ms_batch16"] > 0 and 0.5 < row["feature_cosine"] < 1
        assert row["image_macs"] <= row["budget"] * found["dense_image_macs"] and row["method"].endswith(
            f": {row['x']}"
        )
    assert (config.out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (config.out / "curve.csv").read_text().count("\n") == len(found["rows"]) + 1
    assert "block of the one cut" in capsys.readouterr().out
    monkeypatch.setattr(trained, "_judge", lambda *_: pytest.fail("measured again"))
    main(replace(config, time_batches=0))
    again = json.loads((config.out / "curve.json").read_text())["rows"]
    assert [row["feature_cosine"] for row in again] == [row["feature_cosine"] for row in found["rows"]]
    assert again[0]["ms_batch16"] is None
    with pytest.raises(UserError, match="was begun with other settings: rest"):
        main(replace(config, rest="drop"))


def test_towers_prune_as_apply_does() -> None:
    clip = open_clip_model().eval()
    tower = open_clip_models.tower(clip)
    _, entries = make_entries(tower, (0.75,), "fold")
    image_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for entry in entries:
            applied_BD = patchrank.apply(clip, spec=entry.spec).encode_image(image_BCHW)
            torch.testing.assert_close(entry.run(image_BCHW), applied_BD, atol=1e-5, rtol=1e-4)
            assert not torch.allclose(applied_BD, clip.encode_image(image_BCHW), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(macs=(0.01,)), "--macs 0.01: no cuts reach any of these"),
        (dict(macs=(7.0,)), "--macs 7: must lie in"),
        (dict(time_batches=-1), "--time-batches -1"),
        (dict(rest="melt"), "--rest melt: unknown; choose one of"),
    ],
)
def test_wrong_flags_are_refused(config, changes, words) -> None:
    with pytest.raises(UserError, match=words):
        main(replace(config, **changes))
    assert not (config.out / "curve.json").exists()
