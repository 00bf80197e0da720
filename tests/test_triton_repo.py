"""serve_folder.py, triton_config.py, triton_layout.py, triton_repo.py: what is written, and what is left alone."""

import json
from pathlib import Path

import pytest
from fake_export import write_export

from export.serve_folder import open_folder
from export.triton_config import Limits, Word, text_of
from export.triton_layout import KEPT_VERSIONS, versions_of
from export.triton_repo import TritonConfig, docker_line, main, write_repository
from patchrank import cli
from patchrank.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_export(tmp_path / "export")


def parsed(repository: Path, name: str):
    """config.pbtxt as Triton's own message; a field it does not know is an error."""
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    return text_format.Parse((repository / name / "config.pbtxt").read_text(), messages.ModelConfig())


def names(repository: Path) -> set[str]:
    return {path.name for path in repository.iterdir()}


def test_text_of_every_kind_of_field() -> None:
    fields = {"name": 'a "b"\\\n', "n": 3, "on": True, "kind": Word("KIND_CPU"), "dims": [1, 2], "each": [{"n": 1}, {}]}
    assert text_of(fields) == (
        'name: "a \\"b\\"\\\\\\n"\nn: 3\non: true\nkind: KIND_CPU\ndims: [ 1, 2 ]\neach {\n  n: 1\n}\neach {\n}\n'
    )


def test_a_repository_of_every_variant_the_text_tower_and_an_alias(folder: Path, tmp_path: Path) -> None:
    limits = Limits(max_batch=8, max_delay_ms=1.5, max_queue=9, timeout_ms=70, instances=2, threads=3, device="cpu")
    manifest = write_repository(open_folder(folder), limits, tmp_path / "out")
    repository = tmp_path / "out" / "models"
    assert names(repository) == {"patchrank", "patchrank-keep-1", "patchrank-keep-0.5", "patchrank-text"}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert manifest["alias"] == {"patchrank": "patchrank-keep-0.5"}
    config = parsed(repository, "patchrank-keep-0.5")
    assert (config.backend, config.max_batch_size) == ("onnxruntime", 8)
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("image", 2, [32, 32, 3])]
    assert [output.name for output in config.output][-1] == "kept"
    queue = config.dynamic_batching
    assert queue.max_queue_delay_microseconds == 1500
    assert queue.default_queue_policy.max_queue_size == 9
    assert queue.default_queue_policy.default_timeout_microseconds == 70_000
    assert queue.default_queue_policy.timeout_action == 0, "REJECT"
    (group,) = config.instance_group
    assert (group.kind, group.count) == (2, 2), "KIND_CPU"
    assert config.parameters["intra_op_thread_count"].string_value == "3"
    assert [(warm.batch_size, warm.inputs["image"].zero_data) for warm in config.model_warmup] == [(1, True), (8, True)]
    assert config.version_policy.latest.num_versions == 1
    labels = next(output.label_filename for output in config.output if output.name == "probabilities")
    assert (repository / "patchrank-keep-0.5" / labels).read_text() == "zero\none\ntwo\n"
    assert parsed(repository, "patchrank-text").input[0].name == "token"
    assert not (repository / "patchrank-text" / "labels.txt").exists()


def test_the_alias_passes_every_tensor_on(folder: Path, tmp_path: Path) -> None:
    write_repository(open_folder(folder, default="keep-1"), Limits(), tmp_path)
    alias, model = parsed(tmp_path / "models", "patchrank"), parsed(tmp_path / "models", "patchrank-keep-1")
    (step,) = alias.ensemble_scheduling.step
    assert (alias.platform, step.model_name, step.model_version) == ("ensemble", "patchrank-keep-1", -1)
    assert dict(step.output_map) == {output.name: output.name for output in model.output}
    assert dict(step.input_map) == {"image": "image"}
    assert list(alias.output) == list(model.output)
    assert list((tmp_path / "models" / "patchrank" / "1").iterdir()) == []


def test_weights_lie_on_the_disk_once_and_under_the_graphs_name_for_them(folder: Path, tmp_path: Path) -> None:
    write_repository(open_folder(folder), Limits(), tmp_path)
    paths = [tmp_path / "models" / f"patchrank-keep-{keep}" / "1" / "image-float32-0.bin" for keep in ("1", "0.5")]
    assert paths[0].stat().st_ino == paths[1].stat().st_ino != (folder / "image-float32-0.bin").stat().st_ino
    assert (paths[0].parent / "model.onnx").read_text() == "graph 1"


def test_a_second_run_changes_nothing_and_other_weights_make_a_version(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_repository(open_folder(folder), Limits(), out)

    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (out / "models").rglob("*")}

    before = state()
    write_repository(open_folder(folder), Limits(), out)
    assert state() == before
    for number in (2, 3):
        write_export(folder, content=str(number))
        manifest = write_repository(open_folder(folder), Limits(), out)
        assert {model["version"] for model in manifest["models"]} == {number}
    assert versions_of(out / "models" / "patchrank-keep-1") == [2, 3][-KEPT_VERSIONS:]
    assert (out / "models" / "patchrank-keep-1" / "3" / "model.onnx").read_text() == "graph 13"
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_models_of_an_earlier_run_go_and_others_stay(folder: Path, tmp_path: Path) -> None:
    for name in ("patchrank-keep-0.9", "patchranking", "other"):
        (tmp_path / "models" / name).mkdir(parents=True)
    write_repository(open_folder(folder), Limits(), tmp_path)
    assert {"patchranking", "other"} < names(tmp_path / "models")
    assert "patchrank-keep-0.9" not in names(tmp_path / "models")


def test_tensorrt_plans_are_served_where_there_are_some(folder: Path, tmp_path: Path) -> None:
    (folder / "half.plan").write_text("plan")
    models = [{"engine": "half.plan", "graph": "image-keep-0.5-float32.onnx"}]
    engines = {"backend": "tensorrt", "batch": [1, 2, 4], "models": models}
    (folder / "image-engines.json").write_text(json.dumps(engines))
    write_repository(open_folder(folder), Limits(max_batch=64), tmp_path)
    config = parsed(tmp_path / "models", "patchrank-keep-0.5")
    assert (config.backend, config.max_batch_size, config.instance_group[0].kind) == ("tensorrt", 4, 1)
    assert (tmp_path / "models" / "patchrank-keep-0.5" / "1" / "model.plan").read_text() == "plan"
    assert parsed(tmp_path / "models", "patchrank").max_batch_size == 4
    assert parsed(tmp_path / "models", "patchrank-keep-1").backend == "onnxruntime"
    (folder / "image-engines.json").write_text(json.dumps(engines | {"backend": "tensorrt-rtx"}))
    write_repository(open_folder(folder), Limits(), tmp_path / "rtx")
    assert parsed(tmp_path / "rtx" / "models", "patchrank-keep-0.5").backend == "onnxruntime"


def test_the_docker_line_names_the_image_as_the_readers_choice(tmp_path: Path) -> None:
    line = docker_line(tmp_path / "a folder", "cpu")
    assert line.startswith("docker run --rm -p 127.0.0.1:8000-8002") and " $TRITON_IMAGE tritonserver " in line
    assert f"'{tmp_path}/a folder':/models:ro" in line and "--gpus" not in line
    assert "--gpus all" in docker_line(tmp_path, "gpu") and "--gpus" not in docker_line(tmp_path, "auto")


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    cli.run(main, TritonConfig, prog="python -m export.triton_repo", args=flags)
    printed = capsys.readouterr().out
    assert "patchrank-keep-0.5: version 1, onnxruntime, float32, 0.600 of dense MACs" in printed
    assert "$TRITON_IMAGE" in printed.splitlines()[-1]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--device tpu", "choose one of auto, cpu, gpu"),
        ("--max-batch 0", "1 or more"),
        ("--max-delay -1", "0 or more"),
        ("--timeout 1", "longer than --max-delay"),
        ("--model nowhere", "must be a folder"),
        ("--model {tmp}", "holds no export"),
        ("--precision int4", "choose one of float32"),
        ("--default keep-0.1", "choose one of keep-1, keep-0.5"),
    ],
)
def test_bad_flags_are_one_line(folder: Path, tmp_path: Path, flags: str, words: str, capsys) -> None:
    args = ["--model", str(folder), "--out", str(tmp_path / "out"), *flags.format(tmp=tmp_path).split()]
    with pytest.raises(SystemExit) as left:
        cli.run(main, TritonConfig, prog="python -m export.triton_repo", args=args)
    printed = capsys.readouterr().err
    assert left.value.code == 2 and words in printed and printed.count("\n") == 1


def test_damaged_and_mixed_folders_are_refused(folder: Path) -> None:
    write_export(folder.parent / "other", content="other")
    text = (folder / "text.json").read_text()
    (folder / "text.json").write_text((folder.parent / "other" / "text.json").read_text())
    with pytest.raises(UserError, match="different weights"):
        open_folder(folder)
    (folder / "text.json").write_text(text)
    (folder / "image-float32-0.bin").write_text("weighty")
    with pytest.raises(UserError, match="absent or damaged"):
        open_folder(folder)
    (folder / "image-float32-0.bin").unlink()
    with pytest.raises(UserError, match="absent or damaged"):
        open_folder(folder)
