"""`python -m export.trt`: which TensorRT, what happens without one, and TensorRT-RTX engines built without a GPU."""

import ctypes
import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import make_tower
from onnx import TensorProto, helper, numpy_helper

import export.engine
import export.trt
from export.engine import Backend, Build, MissingBackend, RefusedGraph, build_engine, find_backend
from export.engine_run import open_engine
from export.onnx_file import write_graphs
from export.parity import ParityError
from export.serving import ServingGraph
from export.tracing import trace
from export.trt import TrtConfig, build_engines, check_trt
from patchrank import cli
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess
from patchrank.pruned import PrunedTower
from patchrank.scorers import SCORERS
from patchrank.spec import PruneSpec


def install(monkeypatch: pytest.MonkeyPatch, *names: str, gpu: bool) -> None:
    """Let exactly these modules be there, with or without a GPU."""
    honest = importlib.import_module

    def import_module(name: str, package: str | None = None):
        if name in ("tensorrt", "tensorrt_rtx"):
            if name not in names:
                raise ImportError(name)
            return SimpleNamespace(__version__="0", __name__=name)
        return honest(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


@pytest.mark.parametrize(
    "asked, installed, gpu, found",
    [
        ("auto", ("tensorrt", "tensorrt_rtx"), True, "tensorrt"),
        ("auto", ("tensorrt", "tensorrt_rtx"), False, "tensorrt-rtx"),
        ("auto", ("tensorrt_rtx",), True, "tensorrt-rtx"),
        ("tensorrt", ("tensorrt",), True, "tensorrt"),
        ("tensorrt-rtx", ("tensorrt_rtx",), False, "tensorrt-rtx"),
    ],
)
def test_backend(asked: str, installed: tuple, gpu: bool, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *installed, gpu=gpu)
    assert find_backend(asked).name == found


@pytest.mark.parametrize(
    "asked, installed, gpu, said",
    [
        ("auto", (), False, r"tensorrt-rtx: not installed; pip install 'patchrank\[rtx\]'"),
        ("auto", ("tensorrt",), False, r"patchrank\[rtx\]"),
        ("tensorrt", ("tensorrt",), False, "no GPU"),
        ("tensorrt", (), True, r"patchrank\[trt\]"),
    ],
)
def test_missing_backend(asked: str, installed: tuple, gpu: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *installed, gpu=gpu)
    with pytest.raises(MissingBackend, match=said):
        find_backend(asked)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(precision=("int8",)), "--precision int8"),
        (dict(batch=(4, 2, 8)), "--batch 4 2 8"),
        (dict(batch=(0, 2, 8)), "--batch 0 2 8"),
        (dict(architectures=()), "--architectures"),
        (dict(images=0), "--images 0"),
    ],
)
def test_rules_of_the_flags(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_trt(TrtConfig(**changes))


def test_unknown_backend_lists_the_known() -> None:
    with pytest.raises(UserError, match="auto, tensorrt, tensorrt-rtx"):
        find_backend("onnx")


def test_without_tensorrt_the_graphs_are_written_and_the_exit_code_is_3(monkeypatch, capsys, tmp_path: Path) -> None:
    install(monkeypatch, gpu=False)
    exported = []
    monkeypatch.setattr(export.trt, "export", lambda config: exported.append(config.out) or {"models": []})
    with pytest.raises(SystemExit) as leaving:
        cli.run(export.trt.main, TrtConfig, prog="x", args=["--out", str(tmp_path)])
    assert (leaving.value.code, exported) == (3, [tmp_path])
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "pip install" in message


class FakeTensorRT(SimpleNamespace):
    """As much of TensorRT's Python interface as a build needs, noting what was asked of it."""

    __version__ = "11.0"

    class ILogger:
        ERROR = 1

    class NetworkDefinitionCreationFlag:
        STRONGLY_TYPED = 1

    LayerType = SimpleNamespace(ATTENTION_INPUT="attention")

    def __init__(self, errors: list | None = None, engine: bytes | None = b"engine") -> None:
        super().__init__()
        notes, self.notes = {}, {}
        self.notes = notes
        cache = SimpleNamespace(serialize=lambda: b"timings")
        profile = SimpleNamespace(set_shape=lambda name, *shapes: notes.update(profile=(name, shapes)))
        config = SimpleNamespace(
            add_optimization_profile=lambda given: None,
            create_timing_cache=lambda data: notes.update(cache=data) or cache,
            set_timing_cache=lambda given, ignore_mismatch: notes.update(mismatch=ignore_mismatch),
            get_timing_cache=lambda: cache,
        )
        value = SimpleNamespace(name="image", shape=(-1, 8, 8, 3))
        network = SimpleNamespace(num_layers=0, num_inputs=1, get_input=lambda number: value)
        self.Builder = lambda logger: SimpleNamespace(
            create_network=lambda flags: notes.update(flags=flags) or network,
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: profile,
            build_serialized_network=lambda *given: engine,
        )
        self.OnnxParser = lambda *given: SimpleNamespace(
            parse_from_file=lambda path: not errors,
            num_errors=len(errors or []),
            get_error=lambda number: errors[number],
        )


def test_tensorrt_builds_strongly_typed_with_a_profile_and_a_timing_cache(tmp_path: Path) -> None:
    trt, cache = FakeTensorRT(), tmp_path / "timing.cache"
    build = Build(batch=(1, 4, 8), timing_cache=cache)
    assert build_engine(Backend("tensorrt", trt), tmp_path / "x.onnx", build) == b"engine"
    assert trt.notes["flags"] == 2
    assert trt.notes["profile"] == ("image", ((1, 8, 8, 3), (4, 8, 8, 3), (8, 8, 8, 3)))
    assert (trt.notes["cache"], cache.read_bytes()) == (b"", b"timings")
    build_engine(Backend("tensorrt", trt), tmp_path / "x.onnx", build)
    assert (trt.notes["cache"], trt.notes["mismatch"]) == (b"timings", False)


def test_a_refused_graph_says_why_and_where(tmp_path: Path) -> None:
    def reason(name: str):
        return SimpleNamespace(node_operator=lambda: "Scatter", node_name=lambda: name, desc=lambda: "no importer")

    trt = FakeTensorRT(errors=[reason("n1"), reason("n2")])
    with pytest.raises(RefusedGraph, match=r"x.onnx.*Scatter n1: no importer; Scatter n2: no importer"):
        build_engine(Backend("tensorrt", trt), tmp_path / "x.onnx", Build())
    with pytest.raises(RefusedGraph, match="no engine"):
        build_engine(Backend("tensorrt", FakeTensorRT(engine=None)), tmp_path / "x.onnx", Build())


def test_a_refused_graph_leaves_the_old_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrtConfig(out=tmp_path, precision=("float32",))
    exported = {"models": [{"graph": f"{name}.onnx", "precision": "float32"} for name in ("a", "b")]}
    backend = Backend("tensorrt", FakeTensorRT())
    monkeypatch.setattr(export.trt, "build_engine", lambda *given: b"first")
    manifest = build_engines(config, backend, exported)
    assert [model["engine"] for model in manifest["models"]] == ["a.plan", "b.plan"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"a.plan", "b.plan", "image-engines.json"}

    def refuse_b(backend: Backend, graph: Path, build: Build) -> bytes:
        if graph.stem == "b":
            raise RefusedGraph("b")
        return b"second"

    monkeypatch.setattr(export.trt, "build_engine", refuse_b)
    with pytest.raises(RefusedGraph):
        build_engines(config, backend, exported)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_float32_products_are_not_cut_to_tf32(tmp_path: Path) -> None:
    trt, cleared = FakeTensorRT(), []
    trt.BuilderFlag = SimpleNamespace(TF32="tf32")
    honest = trt.Builder(None).create_builder_config()
    honest.clear_flag = cleared.append
    build_engine(Backend("tensorrt", trt), tmp_path / "x.onnx", Build())
    assert cleared == ["tf32"]


class FakeRuntime(SimpleNamespace):
    """As much of TensorRT's runtime as `open_engine` needs: an engine that gives twice its input as float32."""

    __version__ = "11.0"
    ILogger = FakeTensorRT.ILogger
    TensorIOMode = SimpleNamespace(INPUT="in")

    def Runtime(self, logger):
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self.engine() if data == b"engine" else None)

    def nptype(self, kind: str):
        return np.dtype(kind)

    def engine(self):
        context = SimpleNamespace(addresses={}, shape=None)
        context.set_input_shape = lambda name, shape: setattr(context, "shape", shape)
        context.get_tensor_shape = lambda name: context.shape
        context.set_tensor_address = context.addresses.__setitem__

        def execute(stream: int) -> bool:
            count = int(np.prod(context.shape))
            read = (ctypes.c_uint8 * count).from_address(context.addresses["image"])
            write = (ctypes.c_float * count).from_address(context.addresses["feature"])
            write[:] = [2.0 * value for value in read]
            return True

        context.execute_async_v3 = execute
        return SimpleNamespace(
            create_execution_context=lambda: context,
            num_io_tensors=2,
            get_tensor_name=lambda number: ("image", "feature")[number],
            get_tensor_mode=lambda name: "in" if name == "image" else "out",
            get_tensor_dtype=lambda name: "float32",
        )


def test_an_engine_is_run_through_its_tensors() -> None:
    runner = open_engine(Backend("tensorrt", FakeRuntime()), b"engine", device="cpu")
    assert runner.output_names == ("feature",)
    for batch in (1, 3):
        image = np.arange(batch * 4, dtype=np.uint8).reshape(batch, 4)
        (found,) = runner.run(image, ("feature",))
        assert found.dtype == np.float32
        assert np.array_equal(found, 2.0 * image)
    with pytest.raises(RuntimeError, match="cannot load"):
        open_engine(Backend("tensorrt", FakeRuntime()), b"another", device="cpu")


def test_an_engine_that_fails_the_gate_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrtConfig(out=tmp_path, precision=("float32",))
    exported = {"models": [{"graph": "a.onnx", "precision": "float32"}]}
    monkeypatch.setattr(export.trt, "build_engine", lambda *given: b"engine")
    backend = Backend("tensorrt", FakeTensorRT())
    manifest = build_engines(config, backend, exported, lambda engine, model: {"ms_p50": 1.5})
    assert (manifest["executed"], manifest["models"][0]["ms_p50"]) == (True, 1.5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(engine: bytes, model: dict) -> dict:
        raise ParityError("differs")

    with pytest.raises(ParityError):
        build_engines(config, backend, exported, refuse)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture(scope="module")
def rtx() -> Backend:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is absent: pip install 'patchrank[rtx]'")
    return find_backend("tensorrt-rtx")


@pytest.mark.system
@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("rest", ["fold", "drop"])
def test_rtx_engines_for_two_architectures(rtx: Backend, rest: str, opset: int, tmp_path: Path) -> None:
    tower = make_tower(num_layers=3)
    spec = PruneSpec(cuts=((1, 0.75), (2, 0.5)), rest=rest, select="suppress")
    pruned = PrunedTower(tower, spec, SCORERS["token-norm"](tower.config.grid))
    preprocess = Preprocess(image_size=(32, 32), resize=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    graph = ServingGraph(pruned, preprocess).eval()
    traced = {"g": trace(graph, graph.example(), graph.input_name, graph.output_names, opset)}
    for precision in ("float32", "float16"):
        (_, path), _ = write_graphs(tmp_path, traced, precision, "w")
        engine = build_engine(rtx, path, Build(batch=(1, 4, 8), architectures=("sm86", "sm120")))
        assert len(engine) > 100_000


@pytest.mark.system
def test_rtx_names_the_node_that_it_refuses(rtx: Backend, tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4, 4), dtype=np.float32), "w")
    node = helper.make_node("Unknown", ["x", "w"], ["y"], name="the_stray_node", domain="somewhere")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("somewhere", 1)]
    model = helper.make_model(helper.make_graph([node], "g", [value], [result], [weight]), opset_imports=opsets)
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(RefusedGraph, match="the_stray_node"):
        build_engine(rtx, tmp_path / "x.onnx", Build(architectures=("sm86",)))


@pytest.mark.system
def test_rtx_lists_the_architectures_that_it_has(rtx: Backend, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value], [result])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "x.onnx")
    with pytest.raises(UserError, match=r"sm90.*sm89"):
        build_engine(rtx, tmp_path / "x.onnx", Build(architectures=("sm90",)))
