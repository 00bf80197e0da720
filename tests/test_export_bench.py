"""`python -m export.bench`: what is compared, in which order it is timed, and what is written; no speed is asserted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tower
from onnx import TensorProto, helper

import export.bench
import export.bench_graphs
import export.pick
import export.runtimes
from export.bench import bench, main, row_of, table
from export.bench_config import BenchConfig, check
from export.bench_graphs import SHAPES, entries, graph_of, load_tower, macs_of, specs_of
from export.parity import gate
from export.pick import choose, counts_of, pick
from export.source import Pictures
from patchrank.errors import UserError
from patchrank.macs import dense_macs, pruned_macs
from patchrank.presets import spec_for_macs
from patchrank.salient import salient_preset
from patchrank.spec import PruneSpec


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list:
    """Graphs that only pass pixels on, in place of traced towers; every tracing is noted."""
    noted: list = []

    def fake(graph, example, input_name, output_names, opset, **options):
        noted.append(options)
        value = helper.make_tensor_value_info(input_name, TensorProto.UINT8, ["batch", *example.shape[1:]])
        result = helper.make_tensor_value_info("feature", TensorProto.FLOAT, ["batch", *example.shape[1:]])
        node = helper.make_node("Cast", [input_name], ["feature"], name="n", to=TensorProto.FLOAT)
        graph = helper.make_graph([node], "g", [value], [result])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)

    monkeypatch.setattr(export.bench_graphs, "trace", fake)
    return noted


@pytest.fixture
def config(tmp_path: Path) -> BenchConfig:
    return BenchConfig(keep=(0.5,), rounds=2, graphs=tmp_path / "graphs", out=tmp_path / "out")


def test_several_cuts_are_measured_at_the_macs_of_one() -> None:
    tower = SHAPES["ViT-B-16"]
    found = specs_of(BenchConfig(), tower)
    assert [name for name, _, _ in found] == ["dense", "drop-1", "fold-1", "fold-4", "accurate"]
    dense, drop, fold, four, preset = (spec for _, _, spec in found)
    assert dense.cuts == ()
    assert (drop.rest, drop.select, drop.cuts) == ("drop", "topk", ((3, 0.6),))
    assert (fold.rest, fold.select, len(fold.cuts)) == ("fold", "cover", 1), "as patchrank.apply selects"
    assert [layer for layer, _ in four.cuts] == [3, 5, 7, 9]
    assert preset == salient_preset(spec_for_macs, tower, macs_of(tower, fold) / dense_macs(tower))
    assert macs_of(tower, fold) > pruned_macs(tower, fold), "its scorer counts"
    for spec in (four, preset):
        assert 0.98 < macs_of(tower, spec) / macs_of(tower, fold) <= 1.0


def test_a_tower_without_class_token_covers_by_free_scores() -> None:
    tower = replace(SHAPES["ViT-B-16"], num_prefix=0, pool="mean")
    _, _, fold, four, preset = (spec for _, _, spec in specs_of(BenchConfig(), tower))
    assert {fold.select, four.select, preset.select} == {"suppress"}
    assert macs_of(tower, fold) == pruned_macs(tower, fold)


def test_shapes_have_the_published_macs() -> None:
    """17.56 and 81.0 GMAC: docs/design.md, the last block in full."""
    assert dense_macs(SHAPES["ViT-B-16"], class_row_only=False) / 1e9 == pytest.approx(17.56, abs=0.01)
    assert dense_macs(SHAPES["ViT-L-14"], class_row_only=False) / 1e9 == pytest.approx(81.0, abs=0.1)
    assert SHAPES["ViT-L-14-336"].num_patches + 1 == 577


def test_result_file(traces: list, config: BenchConfig, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    tower = make_tower()
    monkeypatch.setattr(export.bench, "load_tower", lambda config: tower)
    config = replace(config, batch=(1, 2), precision=("float32", "float16"), rounds=3)
    main(config)
    result = json.loads((config.out / "export_bench.json").read_text())
    assert len(result["rows"]) == 5 * 2 * 2
    assert (result["threads"], result["rounds"]) == (1, 3)
    dense = [row for row in result["rows"] if not row["num_cuts"]]
    assert [(row["batch"], row["precision"]) for row in dense] == [
        (1, "float32"), (1, "float16"), (2, "float32"), (2, "float16"),
    ]  # fmt: skip
    assert all(row["speedup"] == 1.0 for row in dense if row["precision"] == "float32")
    assert all(row["ms_p50"] <= row["ms_p90"] <= row["ms_p99"] for row in result["rows"])
    assert "speed-up" in capsys.readouterr().out


def test_finished_batches_and_written_graphs_are_not_made_again(traces: list, config: BenchConfig) -> None:
    tower = make_tower()
    first = bench(replace(config, batch=(1,)), tower)
    assert len(traces) == 5
    both = bench(replace(config, batch=(1, 2)), tower)
    assert len(traces) == 5, "graphs lie in --graphs"
    assert both["rows"][:5] == first["rows"], "the batch that was finished was not timed again"
    assert [row["batch"] for row in both["rows"]] == [1] * 5 + [2] * 5
    other = bench(replace(config, batch=(1,), rounds=3), tower)
    assert len(other["rows"]) == 15, "rows of other settings are other rows"
    bench(replace(config, variants=("fold-1",), batch=(1,)), tower)
    assert len(traces) == 5, "fewer of them are there too"
    bench(replace(config, seed=1, batch=(1,)), tower)
    assert len(traces) == 10, "graphs made otherwise are written again"


def test_prepare_only_times_nothing(traces: list, config: BenchConfig) -> None:
    assert bench(replace(config, prepare_only=True), make_tower())["rows"] == []
    assert (
        sorted(path.name for path in (config.graphs / "embedded").glob("*.onnx"))[0] == "accurate-0.5-float32-18.onnx"
    )


def test_a_lost_graph_is_said(traces: list, config: BenchConfig) -> None:
    (found, *_) = entries(config, make_tower())
    found.path.unlink()
    with pytest.raises(UserError, match=r"dense-float32-18\.onnx: missing"):
        entries(config, make_tower())


def test_calls_are_interleaved_and_the_first_round_is_thrown_away(monkeypatch, tmp_path) -> None:
    calls = []

    def opener(path: Path, threads: int):
        return export.runtimes.Runner("fake", ("feature",), lambda image, names: calls.append(path.stem))

    monkeypatch.setitem(export.runtimes.RUNTIMES, "fake", opener)
    paths = [(tmp_path / f"{name}.onnx", "fake") for name in "abc"]
    ms = export.bench.measure(paths, np.zeros((1, 32, 32, 3), dtype=np.uint8), rounds=2, threads=1)
    assert ms.shape == (3, 2)
    assert calls == ["a", "b", "c"] * 3


def test_speed_up_is_the_median_of_ratios_within_rounds(traces: list, config: BenchConfig) -> None:
    entry = replace(entries(config, make_tower())[1], spec=PruneSpec(cuts=((1, 0.5),)))
    row = row_of("m", entry, "onnxruntime", 4, np.array([10.0, 20.0, 5.0]), np.array([20.0, 40.0, 5.0]))
    assert (row["speedup"], row["ms_p50"], row["images_per_s"]) == (2.0, 10.0, 400.0)
    slow = row_of("m", entry, "openvino", 1, np.array([10.0]), np.array([9.0]))
    assert slow["runtime"] == "openvino-cpu"
    assert "does not pay" in table({"rows": [slow]})
    assert "does not pay" not in table({"rows": [row]})


def test_pick_takes_the_most_compute_that_fits_the_measured_latency() -> None:
    tower = make_tower()
    assert counts_of(tower) == [15, 7]
    block_ms = {17: 10.0, 16: 9.0, 8: 5.0}
    spec, predicted = choose(tower, 45.0, block_ms, 42.5)
    assert spec.counts(16) == [(1, 15)]
    assert predicted == 42.0
    (early,), _ = choose(tower, 45.0, block_ms, 36.0)[0].counts(16), None
    assert early == (2, 7), "one block later with fewer tokens spends less than the target; earlier spends more"
    assert choose(tower, 45.0, block_ms, 20.0) is None


def test_pick_says_when_pruning_does_not_pay(traces: list, config: BenchConfig, monkeypatch) -> None:
    tower = make_tower()
    (dense, *_) = entries(config, tower)
    monkeypatch.setattr(export.pick, "block_times", lambda *given: {17: 10.0, 16: 9.0, 8: 5.0})
    image = np.zeros((1, 32, 32, 3), dtype=np.uint8)

    def clock(*values: float):
        return lambda paths, *given: np.array([values[: len(paths)]]).T

    found = pick(replace(config, pick_ms=42.5), tower, dense, image, clock(45.0, 41.0))
    assert (found["cut"]["layer"], found["cut"]["num_kept"], found["measured_ms"]) == (1, 15, 41.0)
    assert "41.0 ms" in found["says"]
    slower = pick(replace(config, pick_ms=42.5), tower, dense, image, clock(45.0, 46.0))
    assert "does not pay at batch 1" in slower["says"]
    never = pick(replace(config, pick_ms=1.0), tower, dense, image, clock(45.0, 46.0))
    assert never["cut"] is None and "no single cut reaches 1 ms" in never["says"]


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(rounds=0), "--rounds 0"),
        (dict(threads=0), "--threads 0"),
        (dict(batch=()), "--batch"),
        (dict(keep=(1.0,)), "--keep 1"),
        (dict(precision=("fp8",)), "--precision fp8"),
        (dict(variants=("tome",)), "--variants tome"),
        (dict(runtime=("tvm",)), "--runtime tvm"),
        (dict(pick_ms=0.0), "--pick-ms 0"),
    ],
)
def test_rules_of_the_flags(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(BenchConfig(**changes))


@pytest.mark.system
def test_vit_b_16_agrees_with_pytorch(tmp_path: Path) -> None:
    """The published shape with random weights: the graph of four folds passes the gate, and is timed."""
    config = BenchConfig(model="ViT-B-16", variants=("fold-4",), rounds=1, batch=(1,), graphs=tmp_path, out=tmp_path)
    tower = load_tower(config)
    found = entries(config, tower)
    image = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    parity = gate(found[1].path, graph_of(tower, found[1].spec, 0), Pictures(list("ab"), image), "float32")
    assert parity.kept_agreement == 1.0
    assert len(bench(config, tower)["rows"]) == 2
