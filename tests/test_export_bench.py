"""`python -m export.bench`: what is compared, in which order it is timed, and what is written; no speed is asserted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tower
from onnx import TensorProto, helper

import export.bench
from export.bench import SHAPES, BenchConfig, bench, check, main, row_of, specs_of, table, write_entries
from export.parity import gate
from export.source import Pictures
from patchrank.errors import UserError
from patchrank.macs import dense_macs, pruned_macs
from patchrank.presets import spec_for_macs
from patchrank.spec import PruneSpec


@pytest.fixture
def no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that only pass pixels on, in place of traced towers."""

    def fake(graph, example, input_name, output_names, opset):
        value = helper.make_tensor_value_info(input_name, TensorProto.UINT8, ["batch", *example.shape[1:]])
        result = helper.make_tensor_value_info("feature", TensorProto.FLOAT, ["batch", *example.shape[1:]])
        node = helper.make_node("Cast", [input_name], ["feature"], name="n", to=TensorProto.FLOAT)
        graph = helper.make_graph([node], "g", [value], [result])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)

    monkeypatch.setattr(export.bench, "trace", fake)


def test_several_cuts_are_measured_at_the_macs_of_one() -> None:
    config = SHAPES["ViT-B-16"]
    (_, dense), (_, drop), (_, fold), (_, four), (_, preset) = specs_of(config, (0.6,), None)
    assert dense.cuts == ()
    assert (drop.rest, drop.select, drop.cuts) == ("drop", "topk", ((3, 0.6),))
    assert (fold.rest, len(fold.cuts)) == ("fold", 1)
    assert [layer for layer, _ in four.cuts] == [3, 5, 7, 9]
    assert preset == spec_for_macs(config, pruned_macs(config, fold) / dense_macs(config))
    for spec in (four, preset):
        assert 0.98 < pruned_macs(config, spec) / pruned_macs(config, fold) <= 1.0


def test_shapes_have_the_published_macs() -> None:
    """17.56 and 81.0 GMAC: docs/design.md, the last block in full."""
    assert dense_macs(SHAPES["ViT-B-16"], class_row_only=False) / 1e9 == pytest.approx(17.56, abs=0.01)
    assert dense_macs(SHAPES["ViT-L-14"], class_row_only=False) / 1e9 == pytest.approx(81.0, abs=0.1)
    assert SHAPES["ViT-L-14-336"].num_patches + 1 == 577


def test_result_file(no_trace: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = BenchConfig(keep=(0.5,), batch=(1, 2), precision=("float32", "float16"), rounds=3, out=tmp_path)
    tower = make_tower()
    monkeypatch.setattr(export.bench, "load_tower", lambda config: tower)
    main(config)
    result = json.loads((tmp_path / "export_bench.json").read_text())
    assert len(result["rows"]) == 5 * 2 * 2
    assert (result["threads"], result["rounds"]) == (1, 3)
    dense = [row for row in result["rows"] if not row["num_cuts"]]
    assert [(row["batch"], row["precision"]) for row in dense] == [
        (1, "float32"), (1, "float16"), (2, "float32"), (2, "float16"),
    ]  # fmt: skip
    assert all(row["speedup"] == 1.0 for row in dense if row["precision"] == "float32")
    assert all(row["ms_p50"] <= row["ms_p90"] <= row["ms_p99"] for row in result["rows"])
    assert "speed-up" in capsys.readouterr().out


def test_calls_are_interleaved_and_the_first_round_is_thrown_away(no_trace, tmp_path, monkeypatch) -> None:
    import onnxruntime

    calls = []

    class Session:
        def __init__(self, path: str, *given) -> None:
            self.name = Path(path).stem

        def run(self, names, inputs) -> None:
            calls.append(self.name)

    config = BenchConfig(keep=(0.5,))
    entries = write_entries(config, make_tower(), tmp_path)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    ms = export.bench.measure(entries, np.zeros((1, 32, 32, 3), dtype=np.uint8), rounds=2, threads=1)
    assert ms.shape == (5, 2)
    assert calls == [entry.path.stem for entry in entries] * 3


def test_speed_up_is_the_median_of_ratios_within_rounds(no_trace: None, tmp_path: Path) -> None:
    entry = replace_spec(write_entries(BenchConfig(keep=(0.5,)), make_tower(), tmp_path)[1])
    row = row_of(BenchConfig(), entry, 4, np.array([10.0, 20.0, 5.0]), np.array([20.0, 40.0, 5.0]))
    assert (row["speedup"], row["ms_p50"], row["images_per_s"]) == (2.0, 10.0, 400.0)
    slow = row_of(BenchConfig(), entry, 1, np.array([10.0]), np.array([9.0]))
    assert "does not pay" in table({"rows": [slow]})
    assert "does not pay" not in table({"rows": [row]})


def replace_spec(entry):
    return replace(entry, spec=PruneSpec(cuts=((1, 0.5),)))


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(rounds=0), "--rounds 0"),
        (dict(threads=0), "--threads 0"),
        (dict(batch=()), "--batch"),
        (dict(keep=(1.0,)), "--keep 1"),
        (dict(precision=("fp8",)), "--precision fp8"),
    ],
)
def test_rules_of_the_flags(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(BenchConfig(**changes))


@pytest.mark.slow
@pytest.mark.system
def test_vit_b_16_agrees_with_pytorch(tmp_path: Path) -> None:
    """The published shape with random weights, fold and four cuts included: every graph passes the gate."""
    import torch

    config = BenchConfig(model="ViT-B-16")
    tower = export.bench.load_tower(config)
    graphs = export.bench.graphs_of(config, tower)
    entries = write_entries(config, tower, tmp_path)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8, generator=generator)
    for entry, graph in zip(entries, graphs):
        parity = gate(entry.path, graph, Pictures(list("abcd"), image), "float32")
        assert parity.kept_agreement == 1.0
    assert len(bench(replace(config, rounds=1, batch=(1,)), tower)["rows"]) == 5
