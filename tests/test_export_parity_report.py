"""`python -m export.parity_report`: which rows there are, and that finished ones are kept; nothing is traced."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import export.parity_report
from export.parity_report import ParityConfig, exports_of, key_of, main, parity_report
from patchrank.errors import UserError


def row(variant: str, precision: str) -> dict:
    shares = dict(kept_agreement=1.0, top1_agreement=None, accuracy=0.5, torch_accuracy=0.5)
    figures = dict(max_abs=1e-6, cosine_mean=1.0, cosine_min=1.0, passed=True, broken=[])
    return dict(variant=variant, precision=precision, runtime="onnxruntime", **shares, **figures)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list:
    """Rows are made up; the second one of a run fails."""
    asked: list = []

    def rows(config: ParityConfig, done: list):
        for precision in config.precision:
            for variant in ("drop-keep-0.6", "fold-keep-0.6"):
                made = row(variant, precision)
                if key_of(made) not in {key_of(before) for before in done}:
                    if asked and asked[-1] == "stop":
                        raise KeyboardInterrupt
                    asked.append(key_of(made))
                    yield made

    monkeypatch.setattr(export.parity_report, "rows", rows)
    return asked


def test_every_keep_is_compared_under_drop_and_fold() -> None:
    found = exports_of(ParityConfig(keep=(0.6, 0.4), macs=(0.7,)))
    assert [(entry.rest, entry.keep, entry.macs) for entry in found] == [
        ("drop", (0.6,), ()), ("fold", (0.6,), ()), ("drop", (0.4,), ()), ("fold", (0.4,), ()), ("fold", (), (0.7,)),
    ]  # fmt: skip


def test_finished_rows_are_kept(computed: list, tmp_path: Path, monkeypatch) -> None:
    config = ParityConfig(out=tmp_path, precision=("float32",))
    parity_report(config)
    assert len(computed) == 2
    result = parity_report(replace(config, precision=("float32", "int8")))
    assert computed[2:] == ["drop-keep-0.6 int8 onnxruntime", "fold-keep-0.6 int8 onnxruntime"]
    assert len(result["rows"]) == 4
    parity_report(replace(config, images=7))
    assert len(computed) == 6, "other images are another question"


def test_an_interrupted_run_keeps_what_it_had(computed: list, tmp_path: Path) -> None:
    config = ParityConfig(out=tmp_path, precision=("float32",))
    parity_report(config)
    computed.append("stop")
    with pytest.raises(KeyboardInterrupt):
        parity_report(replace(config, precision=("float32", "int8")))
    assert len(json.loads((tmp_path / "parity.json").read_text())["rows"]) == 2


def test_result_file_and_table(computed: list, tmp_path: Path, capsys) -> None:
    main(ParityConfig(out=tmp_path, precision=("float32",)))
    result = json.loads((tmp_path / "parity.json").read_text())
    assert {"command", "versions", "machine", "config", "rows"} <= set(result)
    assert "yes" in capsys.readouterr().out
    with pytest.raises(UserError, match="--images 0"):
        main(ParityConfig(out=tmp_path, images=0))
