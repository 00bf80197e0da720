"""`python -m export.trt --keep 0.6`: verified ONNX graphs, then a TensorRT engine of each.

Exit code 3: the graphs were written, but there is no TensorRT here that could build their engines.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.config import ExportConfig, check
from export.engine import Backend, Build, MissingBackend, build_engine, find_backend
from export.onnx_file import export, report
from export.publish import publish, staging
from patchrank import cli
from patchrank.errors import UserError

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


def build_engines(config: TrtConfig, backend: Backend, exported: dict[str, Any]) -> dict[str, Any]:
    """Build an engine of every graph in `config.out` and publish them together; returns their manifest.

    Raises: RefusedGraph, and then the old engines are untouched.
    """
    build = Build(batch=config.batch, architectures=config.architectures, timing_cache=config.out / "timing.cache")
    models = []
    with staging(config.out) as staged:
        for model in exported["models"]:
            name = Path(model["graph"]).stem + _ENDINGS[backend.name]
            (staged / name).write_bytes(build_engine(backend, config.out / model["graph"], build))
            models.append({"engine": name, "graph": model["graph"], "files": [name], "precision": model["precision"]})
        manifest = {
            "kind": "patchrank engines",
            "backend": backend.name,
            "backend_version": backend.version,
            "architectures": list(config.architectures) if backend.name == "tensorrt-rtx" else ["this machine's GPU"],
            "batch": list(config.batch),
            "executed": False,
            "models": models,
        }
        publish(staged, config.out, manifest, f"{config.tower}-engines.json")
    return manifest


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
    engines = build_engines(config, backend, exported)
    for model in engines["models"]:
        size = (config.out / model["engine"]).stat().st_size / 1e6
        target = ", ".join(engines["architectures"])
        made_by = f"{backend.name} {backend.version} for {target}"
        print(f"{config.out / model['engine']}: {size:.1f} MB, {made_by}, built, not executed")


if __name__ == "__main__":
    cli.run(main, TrtConfig, prog="python -m export.trt")
