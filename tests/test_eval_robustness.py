"""`python -m eval robustness` and `throughput` end to end on a tiny model."""

import json
from dataclasses import replace

import numpy as np
import pytest

from eval import robustness, throughput
from eval.records import read_records
from eval.robustness import RobustnessConfig, means
from eval.throughput import ThroughputConfig
from patchrank.data import load_dataset
from patchrank.errors import UserError


def test_variants_are_zero_shot_records_and_means_are_recomputed(model, tmp_path, capsys):
    shared = dict(threads=1, cache=tmp_path / "cache", out=tmp_path / "out")
    config = RobustnessConfig(model=str(model), limit=10, data=("digits", "digits-blur", "digits-contrast"), **shared)
    robustness.main(config)
    records = read_records(config.out)
    assert len(records) == 6 and {record.task for record in records} == {"zeroshot_classification"}
    dense = {record.dataset: record.main for record in records if record.method == "dense"}
    ordered = sorted(records, key=lambda record: config.data.index(record.dataset))
    found = means(ordered)["dense", 1.0]
    assert found.itself == dense["digits"]
    assert found.shifted == pytest.approx((dense["digits-blur"] + dense["digits-contrast"]) / 2)
    assert found.all == pytest.approx(sum(dense.values()) / 3)
    assert "mean of the variants" in capsys.readouterr().out
    images = {record.images_sha256 for record in records}
    assert len(images) == 1, "the same ids in every variant"
    with pytest.raises(UserError, match="--data"):
        robustness.main(replace(config, data=()))
    with pytest.raises(UserError, match="imagenet"):
        robustness.main(replace(config, data=("imagenet",), data_root=tmp_path))


@pytest.mark.parametrize("name", ["digits-noise", "digits-blur", "digits-contrast"])
def test_a_corruption_changes_the_picture_the_same_way_every_time(name):
    clean, shifted = load_dataset("digits"), load_dataset(name)
    assert shifted.images == clean.images and shifted.templates == clean.templates
    id = clean.images[3].id
    assert np.array_equal(shifted.open(id), shifted.open(id))
    assert not np.array_equal(shifted.open(id), clean.open(id))


def test_throughput_has_a_row_for_each_method_and_runtime(model, tmp_path, capsys):
    config = ThroughputConfig(
        model=str(model), methods=("ours", "tome"), macs=(0.7,), runtimes=("torch",), batch=(2,), rounds=2,
        threads=1, out=tmp_path / "out",
    )  # fmt: skip
    throughput.main(config)
    (path,) = config.out.glob("*.json")
    content = json.loads(path.read_text())
    assert [row["method"] for row in content["rows"]] == ["ours", "tome"]
    assert content["batch"] == 2 and content["threads"] == 1 and content["versions"]["torch"]
    for row in content["rows"]:
        assert len(row["ms"]) == len(row["dense_ms"]) == 2 and row["ideal_speedup"] > 1.3
        assert row["speedup"] == pytest.approx(np.median(np.array(row["dense_ms"]) / np.array(row["ms"])))
    assert "torch, 2 images a call" in capsys.readouterr().out
    before = path.read_text()
    throughput.main(config)
    assert path.read_text() == before, "rows that are there are not timed again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtimes": ("tflite",)}, "--runtimes tflite: unknown; choose from torch"),
        ({"batch": (0,)}, "--batch 0"),
        ({"rounds": 0}, "--rounds 0"),
        ({"methods": ("dense",)}, "--methods dense: names nothing"),
    ],
)
def test_mistakes_of_throughput_are_named(model, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        throughput.main(replace(ThroughputConfig(model=str(model), out=tmp_path), **changes))
