"""`python -m export.triton_repo`: a Triton model repository of exported graphs, and how to start a server on it.

One model per variant, all on one copy of the weights; `patchrank` is a second name for the default variant, and
`patchrank-text` the text tower. ONNX graphs run in Triton's ONNX Runtime back end on CPU or GPU; where the export
folder holds TensorRT engines (`export.trt --backend tensorrt` on this kind of GPU), those are served instead.
"""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export.publish import read_manifest
from export.serve_folder import ALIAS, ServedFolder, ServedModel, open_model
from export.triton_config import KINDS, LABELS, Limits, alias_config, model_config
from export.triton_layout import remove_others, write_model
from patchrank import cli
from patchrank.atomic import write_json
from patchrank.errors import UserError
from patchrank.provenance import command, versions


@dataclass(frozen=True, kw_only=True)
class TritonConfig:
    """Write a Triton model repository."""

    model: str = "embedded"
    """"embedded", or a folder that export.onnx_file or export.trt wrote."""
    precision: str = ""
    """One of the exported precisions; without it the first."""
    default: str = ""
    """Variant behind the name without a suffix, as keep-0.6; without it the dearest one that is pruned."""
    device: str = "auto"
    """Where ONNX graphs run: "auto" (GPU if the server has one), "cpu" or "gpu"."""
    max_batch: int = 64
    """Images of one call."""
    max_delay: float = 2.0
    """Milliseconds that the first image of a batch waits for others."""
    max_queue: int = 256
    """Requests that may wait; more are refused at once."""
    timeout: float = 5000.0
    """Milliseconds after which a waiting request is refused."""
    instances: int = 1
    """Copies of each model that compute side by side."""
    threads: int = 1
    """Threads of each copy."""
    out: Path = Path("out/triton")
    """Folder of the repository (models/) and its manifest."""


def check(config: TritonConfig) -> None:
    """Check all that needs no model. Raises: UserError."""
    if config.device not in KINDS:
        raise UserError(f"--device {config.device}: unknown; choose one of {', '.join(KINDS)}")
    for name in ("max_batch", "max_queue", "instances", "threads"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be 1 or more")
    if config.max_delay < 0:
        raise UserError(f"--max-delay {config.max_delay:g}: must be 0 or more milliseconds")
    if config.timeout <= config.max_delay:
        raise UserError(f"--timeout {config.timeout:g}: must be longer than --max-delay {config.max_delay:g}")


def limits_of(config: TritonConfig) -> Limits:
    """The numbers of config.pbtxt."""
    return Limits(
        max_batch=config.max_batch,
        max_delay_ms=config.max_delay,
        max_queue=config.max_queue,
        timeout_ms=config.timeout,
        instances=config.instances,
        threads=config.threads,
        device=config.device,
    )


def engines_of(folder: Path) -> tuple[dict[str, Path], int | None]:
    """TensorRT plans in an export folder: graph's file name -> plan, and their largest batch.

    TensorRT-RTX engines are left out: Triton has no back end for them.
    """
    found: dict[str, Path] = {}
    largest = None
    for tower in ("image", "text"):
        manifest = read_manifest(folder / f"{tower}-engines.json")
        if manifest.get("backend") == "tensorrt":
            found |= {model["graph"]: folder / model["engine"] for model in manifest["models"]}
            largest = manifest["batch"][2]
    return found, largest


def files_of(model: ServedModel, engine: Path | None) -> dict[str, Path]:
    """Name in the version folder -> file; weights keep their name, for the graph knows them by it."""
    if engine is not None:
        return {"model.plan": engine}
    return {"model.onnx": model.graph} | {path.name: path for path in model.weights}


def write_repository(folder: ServedFolder, limits: Limits, out: Path) -> dict[str, Any]:
    """Write or renew `out`/models; returns the manifest, which is written beside it.

    Running it again with other weights adds a version to each model that changed; nothing else is touched.
    """
    repository = out / "models"
    repository.mkdir(parents=True, exist_ok=True)
    engines, largest = engines_of(folder.path)
    labels = {LABELS: "\n".join(folder.class_names) + "\n"} if folder.class_names else {}
    records, placed = [], {}
    for model in [*folder.variants, *([folder.text] if folder.text else [])]:
        engine = engines.get(model.graph.name)
        own = _limits_with(limits, largest if engine else None)
        own_labels = labels if model is not folder.text else {}
        text = model_config(model, own, engine=engine is not None, labels=bool(own_labels))
        version = write_model(repository, model.name, files_of(model, engine), text, own_labels, placed)
        records.append(_record(model, version, "tensorrt" if engine else "onnxruntime"))
    own = _limits_with(limits, largest if folder.default.graph.name in engines else None)
    write_alias(repository, folder, own, labels)
    remove_others(repository, ALIAS, {ALIAS, *(record["name"] for record in records)})
    manifest = {
        "schema": 1,
        "kind": "patchrank triton repository",
        "command": command("export.triton_repo"),
        "versions": versions(),
        "alias": {ALIAS: folder.default.name},
        "preprocess": folder.manifest["preprocess"],
        "classes": folder.manifest.get("classes"),
        "backbone": folder.manifest["backbone"],
        "models": records,
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def _limits_with(limits: Limits, largest: int | None) -> Limits:
    """An engine takes no batch above the one it was built for."""
    return limits if largest is None else replace(limits, max_batch=min(limits.max_batch, largest))


def _record(model: ServedModel, version: int, backend: str) -> dict[str, Any]:
    keys = ("precision", "inputs", "outputs", "spec", "image_macs", "dense_image_macs")
    known = {key: model.record[key] for key in keys if key in model.record}
    return {"name": model.name, "version": version, "backend": backend, **known}


def write_alias(repository: Path, folder: ServedFolder, limits: Limits, labels: dict[str, str]) -> None:
    """The second name of the default variant; its version folder is empty, as an ensemble's must be."""
    write_model(repository, ALIAS, {}, alias_config(ALIAS, folder.default, limits, bool(labels)), labels, {})


def docker_line(repository: Path, device: str) -> str:
    """What starts a stock Triton server on the repository; the image's name stays the reader's choice."""
    gpus = "--gpus all " if device == "gpu" else ""
    place = shlex.quote(str(repository.resolve()))
    return (
        f"docker run --rm {gpus}-p 127.0.0.1:8000-8002:8000-8002 -v {place}:/models:ro $TRITON_IMAGE "
        "tritonserver --model-repository=/models --model-control-mode=explicit --load-model='*'"
    )


def main(config: TritonConfig) -> None:
    """Write the repository and say how to serve it."""
    check(config)
    folder = open_model(config.model, config.out / "onnx", config.precision, config.default)
    manifest = write_repository(folder, limits_of(config), config.out)
    for record in manifest["models"]:
        share = record["image_macs"] / record["dense_image_macs"] if "image_macs" in record else None
        cost = "" if share is None else f", {share:.3f} of dense MACs"
        print(f"{record['name']}: version {record['version']}, {record['backend']}, {record['precision']}{cost}")
    for alias, name in manifest["alias"].items():
        print(f"{alias}: another name of {name}")
    hint = " (on a machine with NVIDIA GPUs add --gpus all)" if config.device == "auto" else ""
    print(f"serve it, with $TRITON_IMAGE a Triton server image{hint}:")
    print(docker_line(config.out / "models", config.device))


if __name__ == "__main__":
    cli.run(main, TritonConfig, prog="python -m export.triton_repo")
