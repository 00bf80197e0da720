"""`torchrun` on training and calibration: two processes learn what one learns from whole batches."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SHARED = [
    "--limit=40", "--held-out=20", "--judged=20", "--batch-size=8", "--num-steps=6", "--save-every=3", "--threads=1",
    "--lr=0.01",
]  # fmt: skip


def run(words: list[str | Path]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def learned(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pruned.safetensors")


def close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        said = partial("{}: {}".format, name)
        torch.testing.assert_close(value, second[name], rtol=2e-3, atol=2e-4, msg=said)


@pytest.mark.system
def test_two_processes_learn_what_one_learns(tmp_path) -> None:
    train = ["-m", "predictors.train", *SHARED, "--added", "summary", "--loss", "distill:1,error:0.5"]
    said = run([*TORCHRUN, *train, "--cache", tmp_path / "tokens", "--out", tmp_path / "two"])
    run([sys.executable, *train, "--out", tmp_path / "one"])
    close(learned(tmp_path / "two"), learned(tmp_path / "one"))
    assert said.count("frozen: cosine") == 1, "one process reports"
    logs = [json.loads((tmp_path / name / "results.json").read_text())["log"] for name in ("two", "one")]
    for two, one in zip(*logs):
        assert two["step"] == one["step"] and two["loss"] == pytest.approx(one["loss"], rel=2e-3)
        assert two["distill"] == pytest.approx(one["distill"], rel=2e-2)
    calibrate = ["-m", "predictors.calibrate", *SHARED, "--pruned", tmp_path / "one"]
    run([*TORCHRUN, *calibrate, "--cache", tmp_path / "tokens", "--out", tmp_path / "c2"])
    run([sys.executable, *calibrate, "--out", tmp_path / "c1"])
    close(learned(tmp_path / "c2"), learned(tmp_path / "c1"))


@pytest.mark.system
def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path) -> None:
    words = [*TORCHRUN, "-m", "predictors.train", *SHARED, "--batch-size", "7", "--out", tmp_path]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "--batch-size 7: must divide by the 2 processes" in done.stderr
    assert not list(tmp_path.iterdir())
