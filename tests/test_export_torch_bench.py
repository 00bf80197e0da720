"""`python -m export.torch_bench`: what is timed, in which order, and what is written; no speed is asserted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tower

import export.torch_bench
from export.bench_graphs import macs_of
from export.runtimes import check_runtimes
from export.torch_bench import TorchBenchConfig, bench, check, interleaved, main
from patchrank.errors import UserError
from patchrank.macs import dense_macs


@pytest.fixture
def config(tmp_path: Path) -> TorchBenchConfig:
    return TorchBenchConfig(keep=(0.5,), batch=(1, 2), rounds=2, out=tmp_path)


def test_result_file(config: TorchBenchConfig, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    tower = make_tower()
    monkeypatch.setattr(export.torch_bench, "load_tower", lambda graphs: tower)
    main(config)
    result = json.loads((config.out / "torch_bench.json").read_text())
    assert [row["variant"] for row in result["rows"]] == ["dense", "drop-1", "fold-1", "fold-4", "accurate"] * 2
    assert [row["batch"] for row in result["rows"]] == [1] * 5 + [2] * 5
    for row in result["rows"]:
        assert row["runtime"] == "torch-cpu"
        assert row["macs_per_s"] == pytest.approx(row["images_per_s"] * row["image_macs"])
        assert row["share_of_peak"] == pytest.approx(row["macs_per_s"] / result["peak_macs_per_s"])
    dense, fold = result["rows"][0], result["rows"][2]
    assert (dense["speedup"], dense["image_macs"]) == (1.0, dense_macs(tower.config))
    assert fold["image_macs"] < dense["image_macs"]
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_towers_run_in_the_named_type(config: TorchBenchConfig, precision: str) -> None:
    seen = set()
    tower = make_tower()
    tower.patch.register_forward_hook(lambda module, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    bench(replace(config, batch=(1,), precision=precision), tower)
    assert seen == {(getattr(torch, precision),) * 2}


def test_calls_take_turns_and_the_warm_up_does_not_count() -> None:
    order = []
    ms = interleaved([lambda: order.append("a"), lambda: order.append("b")], 2, lambda: None, warm_up=1)
    assert order == ["a", "b"] * 3
    assert ms.shape == (2, 2)


def test_fold_counts_its_scorer(config: TorchBenchConfig) -> None:
    tower = make_tower()
    result = bench(replace(config, batch=(1,), variants=("fold-1",)), tower)
    (row,) = (row for row in result["rows"] if row["variant"] == "fold-1")
    spec = export.torch_bench.specs_of(export.torch_bench.BenchConfig(keep=(0.5,)), tower.config)[2][2]
    assert row["image_macs"] == macs_of(tower.config, spec)


@pytest.mark.parametrize(
    "change",
    [dict(precision="int4"), dict(batch=()), dict(rounds=0), dict(device="tpu"), dict(variants=("best",))],
)
def test_wrong_input_is_one_line(config: TorchBenchConfig, change: dict) -> None:
    with pytest.raises(UserError):
        check(replace(config, **change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_said_before_anything_is_done(config: TorchBenchConfig) -> None:
    with pytest.raises(UserError, match="sees no GPU"):
        check(replace(config, device="cuda"))
    with pytest.raises(UserError, match=r"patchrank\[gpu\]"):
        check_runtimes(("onnxruntime-cuda",))
