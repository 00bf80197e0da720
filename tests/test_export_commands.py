"""Whole export commands end to end: ONNX files in two runtimes, the C++ examples on them, engines without a GPU."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.config import ExportConfig
from export.runtimes import open_session
from export.source import load_images
from patchrank.loading import load_clip

pytestmark = pytest.mark.system
CPP = Path(__file__).parents[1] / "export" / "cpp"
OPENVINO = find_spec("openvino") is not None


def command(module: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess:
    """Run `python -m module`, and fail with what it printed if it leaves with another code."""
    words = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=800)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    """`python -m export.onnx_file` without flags but for the folder and the second runtime, where it is installed."""
    out = tmp_path_factory.mktemp("embedded")
    runtimes = ["onnxruntime", "openvino"] if OPENVINO else ["onnxruntime"]
    command("export.onnx_file", "--out", out, "--runtime", *runtimes)
    return out


def test_embedded_default(embedded: Path) -> None:
    manifest = json.loads((embedded / "image.json").read_text())
    (model,) = manifest["models"]
    assert model["name"] == "macs-0.7"
    assert model["image_macs"] <= 0.7 * model["dense_image_macs"]
    for parity in model["parity_by_runtime"].values():
        assert parity["max_abs"] <= 1e-4
        assert (parity["kept_agreement"], parity["top1_agreement"]) == (1.0, 1.0)
    if not OPENVINO:
        pytest.skip("openvino is absent, compared in ONNX Runtime only: pip install 'patchrank[openvino]'")
    assert list(model["parity_by_runtime"]) == ["onnxruntime", "openvino"]


def picture(folder: Path) -> tuple[Path, np.ndarray]:
    """One of the comparison's images as a binary PPM, and as the graph takes it."""
    _, pictures = load_images(ExportConfig(images=1), load_clip().preprocess)
    image = pictures.image_BHW3.numpy()
    path = folder / "picture.ppm"
    path.write_bytes(f"P6\n{image.shape[2]} {image.shape[1]}\n255\n".encode() + image.tobytes())
    return path, image


def classify(program: Path, embedded: Path, folder: Path) -> None:
    """The program's answer is the one of Python, and it refuses what is no picture in one line."""
    ppm, image = picture(folder)
    (graph,) = embedded.glob("*.onnx")
    session = open_session(graph)
    index, probability = session.run(["top5_index", "top5_probability"], {"image": image})
    done = subprocess.run([program, graph, ppm], capture_output=True, text=True, check=True, timeout=120)
    found = np.array([line.split() for line in done.stdout.splitlines()], dtype=float)
    assert found[:, 0].astype(int).tolist() == index[0].tolist()
    np.testing.assert_allclose(found[:, 1], probability[0], atol=1e-4)
    refused = subprocess.run([program, graph, graph], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


def compiled(source: str, folder: Path, *options: str) -> Path:
    """An example, built by g++."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is absent")
    program = folder / Path(source).stem
    subprocess.run(["g++", "-std=c++17", CPP / source, "-o", program, *options], check=True, timeout=600)
    return program


@pytest.mark.skipif(not OPENVINO, reason="openvino is absent: pip install 'patchrank[openvino]'")
def test_cpp_example_with_openvino(embedded: Path, tmp_path: Path) -> None:
    """Headers and libraries are those of the Python package."""
    home = Path(find_spec("openvino").origin).parent
    (library,) = (home / "libs").glob("libopenvino.so.*")
    libs = home / "libs"
    program = compiled(
        "classify_openvino.cpp",
        tmp_path,
        f"-I{home / 'include'}",
        f"-L{libs}",
        f"-l:{library.name}",
        f"-Wl,-rpath,{libs}",
    )
    classify(program, embedded, tmp_path)


def test_cpp_example_with_onnx_runtime(embedded: Path, tmp_path: Path) -> None:
    """The library is that of the Python package; its headers come with Debian's libonnxruntime-dev, or a release."""
    places = [os.environ.get("ONNXRUNTIME_INCLUDE", ""), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
    headers = next((place for place in places if place and (Path(place) / "onnxruntime_cxx_api.h").is_file()), None)
    if headers is None:
        pytest.skip("ONNX Runtime's C++ headers are absent: install libonnxruntime-dev or set ONNXRUNTIME_INCLUDE")
    libraries = list((Path(find_spec("onnxruntime").origin).parent / "capi").glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("this onnxruntime package has no libonnxruntime.so")
    shutil.copy(libraries[0], tmp_path / "libonnxruntime.so.1")
    library = str(tmp_path / "libonnxruntime.so.1")
    classify(compiled("classify.cpp", tmp_path, f"-I{headers}", library, f"-Wl,-rpath,{tmp_path}"), embedded, tmp_path)


def test_real_tower_in_three_precisions_from_one_weights_file(assets: Path, tmp_path: Path) -> None:
    weights = assets / "weights" / "vit_tiny_patch16_224_tiny-imagenet.safetensors"
    real = ("--model", "vit_tiny_patch16_224", "--pretrained", weights, "--data", "tiny-imagenet")
    command(
        "export.onnx_file", *real, "--keep", "0.8", "0.6", "--images", "24", "--calibration", "16",
        "--precision", "float32", "int8", "--opset", "23", "--source", "64", "64", "--out", tmp_path,
    )  # fmt: skip
    manifest = json.loads((tmp_path / "image.json").read_text())
    assert [(model["name"], model["precision"]) for model in manifest["models"]] == [
        (keep, precision) for precision in ("float32", "int8") for keep in ("keep-0.8", "keep-0.6")
    ]
    eight, six, *_ = manifest["models"]
    assert [name for name in eight["files"] if name in six["files"]], "both keep rates read one weights file"
    assert eight["operators"]["Attention"] == 12
    assert manifest["resized_in_graph_from"] == [64, 64]
    assert eight["inputs"][0]["shape"] == ["batch", 64, 64, 3]


RTX = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is absent: pip install 'patchrank[rtx]'"
)


@RTX
@pytest.mark.parametrize("rest", ["drop", "fold"])
def test_engines_without_a_gpu(rest: str, tmp_path: Path) -> None:
    done = command(
        "export.trt", "--backend", "tensorrt-rtx", "--keep", "0.6", "--rest", rest, "--precision", "float32", "float16",
        "--architectures", "sm86", "sm120", "--images", "16", "--batch", "1", "4", "8", "--out", tmp_path,
    )  # fmt: skip
    manifest = json.loads((tmp_path / "image-engines.json").read_text())
    assert [model["precision"] for model in manifest["models"]] == ["float32", "float16"]
    assert manifest["architectures"] == ["sm86", "sm120"]
    assert done.stdout.count("built, not executed") == 2
    assert all((tmp_path / model["engine"]).stat().st_size > 1_000_000 for model in manifest["models"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: engines can be built")
def test_without_tensorrt_the_verified_graph_is_there_and_the_code_is_3(tmp_path: Path) -> None:
    done = command("export.trt", "--backend", "tensorrt", "--keep", "0.6", "--images", "8", "--out", tmp_path, code=3)
    assert "ONNX graphs above are complete" in done.stderr
    (graph,) = tmp_path.glob("*-float16.onnx")
    onnx.checker.check_model(str(graph))
