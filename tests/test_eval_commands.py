"""Every accuracy and speed command as a user types it: without flags, on the embedded model, in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval.__main__ import COMMANDS, main, usage
from eval.records import TASKS, read_records, read_sides

ROOT = Path(__file__).parent.parent
ACCURACY = {"zero-shot": 2, "retrieval": 2, "probe": 2, "robustness": 8, "composition": 6}
"""Command -> records that it leaves."""


def run(folder: Path, *words: str) -> str:
    """Standard output of `python -m eval ...` in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("PATCHRANK_ASSETS", None)
    done = subprocess.run(
        [sys.executable, "-m", "eval", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_commands_are_listed():
    for name in (*ACCURACY, "throughput", "reported"):
        assert name in COMMANDS and f"  {name} " in usage()


@pytest.mark.parametrize("name", [*ACCURACY, "compare", "suite"])
def test_a_data_root_that_is_not_a_folder_is_refused(name, tmp_path, monkeypatch, capsys):
    """Also on the embedded default, which reads nothing from it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main([name, "--data-root", "nowhere"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1 and "--data-root nowhere is not a folder; give" in said
    assert not list(tmp_path.glob("out/*/*.json"))


@pytest.mark.system
@pytest.mark.timeout(900)
def test_accuracy_commands_run_without_flags(tmp_path):
    for name, num_records in ACCURACY.items():
        printed = run(tmp_path, name)
        records = read_records(tmp_path / "out" / name)
        assert len(records) == num_records and f"{num_records} records in out/{name}" in printed
        for record in records:
            assert record.task in TASKS and record.model == "embedded" and 0 < record.main <= 1
            assert len(read_sides(tmp_path / "out" / name, record)["ids"]) == record.num_images == 200
            if record.method != "dense":
                assert record.metrics["cosine"] > 0.98 and record.macs_share == pytest.approx(0.7, rel=0.01)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name not in ACCURACY] == ["features"]


@pytest.mark.system
@pytest.mark.timeout(900)
def test_throughput_runs_without_flags(tmp_path):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'patchrank[cpu]'")
    printed = run(tmp_path, "throughput", "--threads", "1")
    first, second = printed.split("onnxruntime, 16 images a call")
    assert "torch, 16 images a call" in first and "tome" in first and "tome" not in second, "ToMe is not exported"
    assert "ours" in first and "ours" in second and len(list((tmp_path / "out/throughput").glob("*.json"))) == 2
