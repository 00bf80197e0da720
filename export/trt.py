"""`python -m export.trt --keep 0.6`: verified ONNX graphs, then a TensorRT engine of each.

Exit code 3: the graphs were written, but there is no TensorRT here that could build their engines.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.config import ExportConfig, check
from export.engine import Backend, Build, MissingBackend, build_engine, find_backend
from export.engine_run import open_engine
from export.onnx_file import export, report
from export.parity import check as check_parity
from export.parity import compare
from export.publish import publish, staging
from export.reference import reference
from export.runtimes import Runner
from export.source import as_numpy, load_images, variants
from patchrank import cli
from patchrank.errors import UserError
from patchrank.loading import load_clip

_ENDINGS = {"tensorrt": ".plan", "tensorrt-rtx": ".rtx"}


@dataclass(frozen=True, kw_only=True)
class TrtConfig(ExportConfig):
    """Write a CLIP tower as TensorRT engines, and as the ONNX graphs they are built from."""

    precision: tuple[str, ...] = ("float16",)
    """Precisions: float32, float16. Engines are strongly typed, so this is the type of the graph."""
    backend: str = "auto"
    """"tensorrt" (builds and times on this machine's GPU), "tensorrt-rtx" (builds without a GPU), or "auto"."""
    architectures: tuple[str, ...] = ("sm86", "sm89", "sm120")
    """GPU architectures of a TensorRT-RTX engine: sm75, sm80, sm86, sm89, sm120, sm121."""
    batch: tuple[int, int, int] = (1, 16, 64)
    """Smallest, best and largest batch of an engine."""
    out: Path = Path("out/trt")
    """Folder of the engines, the graphs, their weights and the manifests."""


def check_trt(config: TrtConfig) -> None:
    """Check all that needs neither model nor TensorRT. Raises: UserError."""
    check(config)
    if "int8" in config.precision:
        raise UserError("--precision int8: dynamic quantisation is for CPU runtimes; use float16 or float32 here")
    if not 1 <= config.batch[0] <= config.batch[1] <= config.batch[2]:
        raise UserError(f"--batch {' '.join(map(str, config.batch))}: must rise from 1: smallest, best, largest")
    if not config.architectures:
        raise UserError("--architectures: names none; write for example --architectures sm89 sm120")


Judge = Callable[[bytes, dict[str, Any]], dict[str, Any]]
"""(engine, record of its graph) -> what running it showed; raises ParityError."""


def build_engines(
    config: TrtConfig, backend: Backend, exported: dict[str, Any], judge: Judge | None = None
) -> dict[str, Any]:
    """Build an engine of every graph in `config.out` and publish them together; returns their manifest.

    Args: judge runs every engine before any is published; None where engines cannot run here.
    Raises: RefusedGraph or ParityError, and then the old engines are untouched.
    """
    build = Build(batch=config.batch, architectures=config.architectures, timing_cache=config.out / "timing.cache")
    models = []
    with staging(config.out) as staged:
        for model in exported["models"]:
            name = Path(model["graph"]).stem + _ENDINGS[backend.name]
            engine = build_engine(backend, config.out / model["graph"], build)
            (staged / name).write_bytes(engine)
            record = {"engine": name, "graph": model["graph"], "files": [name], "precision": model["precision"]}
            models.append(record | ({} if judge is None else judge(engine, model)))
        manifest = {
            "kind": "patchrank engines",
            "backend": backend.name,
            "backend_version": backend.version,
            "architectures": list(config.architectures) if backend.name == "tensorrt-rtx" else ["this machine's GPU"],
            "batch": list(config.batch),
            "executed": judge is not None,
            "models": models,
        }
        publish(staged, config.out, manifest, f"{config.tower}-engines.json")
    return manifest


def judge_on_gpu(config: TrtConfig, backend: Backend) -> Judge:
    """The parity gate and a timing for engines that run on this machine's GPU."""
    clip = load_clip(config.model, config.pretrained)
    dataset, pictures = load_images(config, clip.preprocess)
    graphs = {variant.name: variant.graph for variant in variants(config, clip, dataset)[0]}

    def judge(engine: bytes, model: dict[str, Any]) -> dict[str, Any]:
        graph, runner = graphs[model["name"]], open_engine(backend, engine)
        known = reference(graph, pictures.image_BHW3)
        parity = compare(runner, graph, pictures, model["precision"], known, config.batch[2])
        check_parity(parity, model["precision"], f"engine of {model['graph']}")
        image = as_numpy(pictures.image_BHW3[: config.batch[1]])
        return {"parity": parity.to_dict(), "ms_p50": _median_ms(runner, image), "batch": len(image)}

    return judge


def _median_ms(runner: Runner, image: np.ndarray) -> float:
    """One call with copies to and from the GPU, the median of 20 after 5 that are thrown away."""
    elapsed = []
    for _ in range(25):
        start = time.perf_counter()
        runner.run(image, ("feature",))
        elapsed.append(1000 * (time.perf_counter() - start))
    return float(np.median(elapsed[5:]))


def main(config: TrtConfig) -> None:
    """Export, build, and say what was written; exit code 3 where no TensorRT can build."""
    check_trt(config)
    try:
        backend, missing = find_backend(config.backend), ""
    except MissingBackend as error:
        backend, missing = None, str(error)
    exported = export(config)
    print(report(exported, config.out))
    if backend is None:
        print(f"error: {missing}; the ONNX graphs above are complete", file=sys.stderr)
        raise SystemExit(3)
    runs = backend.name == "tensorrt" and config.tower == "image"
    engines = build_engines(config, backend, exported, judge_on_gpu(config, backend) if runs else None)
    for model in engines["models"]:
        size = (config.out / model["engine"]).stat().st_size / 1e6
        target = ", ".join(engines["architectures"])
        made_by = f"{backend.name} {backend.version} for {target}"
        shown = "built, not executed"
        if "parity" in model:
            shown = f"max-abs {model['parity']['max_abs']:.2g}, {model['ms_p50']:.2f} ms at batch {model['batch']}"
        print(f"{config.out / model['engine']}: {size:.1f} MB, {made_by}, {shown}")


if __name__ == "__main__":
    cli.run(main, TrtConfig, prog="python -m export.trt")
