"""`python -m export.onnx_file`: CLIP towers as ONNX graphs, every one compared with PyTorch before it is published."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from export.config import ExportConfig, check
from export.operators import check_operators, count_operators
from export.parity import Parity, gate
from export.parity_text import gate_text
from export.precision import convert
from export.publish import publish, staging
from export.reference import reference
from export.serving import Classes, ServingGraph
from export.source import Pictures, as_numpy, calibration_images, load_images, variants
from export.text_graph import text_graph, tokenizer_note, tokens_of
from export.tracing import trace
from export.weights_file import WeightsFile
from patchrank import cli
from patchrank.loading import LoadedClip, load_clip
from patchrank.macs import dense_macs
from patchrank.provenance import command, versions
from predictors.costs import learned_macs


def manifest_of(config: ExportConfig, clip: LoadedClip) -> dict[str, Any]:
    """What all graphs of one export share."""
    found = versions() | {name: module.__version__ for name, module in _libraries().items()}
    return {
        "schema": 1,
        "kind": "patchrank export",
        "tower": config.tower,
        "command": command("export.onnx_file"),
        "config": config.to_dict(),
        "backbone": {
            "model": clip.model_name,
            "pretrained": Path(clip.pretrained).name,
            "weights_hash": clip.weights_hash,
            "config": asdict(clip.tower.config),
        },
        "preprocess": clip.preprocess.to_dict(),
        "resized_in_graph_from": None if config.source is None else list(config.source),
        "opset": config.opset,
        "versions": found,
        "models": [],
    }


def _libraries() -> dict[str, Any]:
    import onnxruntime
    import onnxscript

    return {"onnx": onnx, "onnxscript": onnxscript, "onnxruntime": onnxruntime}


def class_record(classes: Classes | None) -> dict[str, Any] | None:
    """Class names in the order of the logits, with a hash that clients can compare."""
    if classes is None:
        return None
    digest = hashlib.sha256("\n".join(classes.names).encode()).hexdigest()
    return {"names": list(classes.names), "sha256": digest, "scale": classes.scale}


def _model_record(
    name: str, path: Path, weights: str, precision: str, model: onnx.ModelProto, parities: dict[str, Parity]
) -> dict[str, Any]:
    (parity, *_) = parities.values()
    return {
        "name": name,
        "graph": path.name,
        "precision": precision,
        "files": [weights, path.name],
        "inputs": [_value(value) for value in model.graph.input],
        "outputs": [_value(value) for value in model.graph.output],
        "operators": dict(sorted(count_operators(model).items())),
        "parity": parity.to_dict(),
        "parity_by_runtime": {runtime: parity.to_dict() for runtime, parity in parities.items()},
    }


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
    dims = value.type.tensor_type.shape.dim
    return {"name": value.name, "dtype": kind, "shape": [dim.dim_param or dim.dim_value for dim in dims]}


def write_graphs(
    folder: Path,
    traced: dict[str, onnx.ModelProto],
    precision: str,
    prefix: str,
    calibration: np.ndarray | None = None,
) -> tuple[list[Path], list[onnx.ModelProto]]:
    """Convert float32 graphs and write them with one weights file: its path first, then the graphs'."""
    weights = WeightsFile(folder, f"{prefix}-{precision}")
    models = []
    for name, model in traced.items():
        converted = convert(model, precision, calibration)
        check_operators(converted, precision)
        weights.add(converted, f"{name}-{precision}.onnx")
        models.append(converted)
    return weights.finish(), models


def export_image(config: ExportConfig, clip: LoadedClip, staged: Path, pictures: Pictures, dataset) -> tuple[dict, str]:
    """Trace, convert, write and compare every variant in every precision: the manifest, and a note.

    Raises: ParityError where a graph differs from PyTorch.
    """
    graphs, note = variants(config, clip, dataset)
    manifest = manifest_of(config, clip) | {"classes": class_record(graphs[0].graph.classes)}
    known = {variant.name: reference(variant.graph, pictures.image_BHW3) for variant in graphs}
    traced = {f"image-{variant.name}": _traced(variant.graph, config.opset) for variant in graphs}
    found = calibration_images(config, clip.preprocess)
    calibration = None if found is None else as_numpy(found.image_BHW3)
    for precision in config.precision:
        (weights, *paths), models = write_graphs(staged, traced, precision, "image", calibration)
        for variant, path, model in zip(graphs, paths, models):
            parities = {
                runtime: gate(path, variant.graph, pictures, precision, known[variant.name], runtime)
                for runtime in config.runtime
            }
            record = _model_record(variant.name, path, weights.name, precision, model, parities)
            manifest["models"].append(record | _cost(variant.graph))
    return manifest, note


def _traced(graph: ServingGraph, opset: int) -> onnx.ModelProto:
    return trace(graph, graph.example(), graph.input_name, graph.output_names, opset)


def _cost(graph: ServingGraph) -> dict[str, Any]:
    """Spec and multiply-accumulates of one image; 1 MAC = 2 FLOP."""
    pruned = graph.pruned
    macs, dense = learned_macs(pruned.config, pruned.spec, pruned.scorer, pruned.added), dense_macs(pruned.config)
    return {"spec": pruned.spec.to_dict(), "image_macs": macs, "dense_image_macs": dense}


def export_text(config: ExportConfig, clip: LoadedClip, staged: Path, texts: list[str]) -> dict[str, Any]:
    """The same for the text tower."""
    graph = text_graph(clip)
    token_BL = tokens_of(clip, texts)
    example_BL = token_BL[:2] if len(token_BL) > 1 else token_BL.repeat(2, 1)
    model = trace(graph, example_BL, graph.input_name, list(graph.output_names), config.opset)
    manifest = manifest_of(config, clip)
    manifest |= {"tokenizer": tokenizer_note(clip), "logit_scale": clip.text.logit_scale}
    for precision in config.precision:
        (weights, path), (converted,) = write_graphs(staged, {"text": model}, precision, "text", token_BL.numpy())
        parities = {runtime: gate_text(path, graph, token_BL, texts, precision, runtime) for runtime in config.runtime}
        manifest["models"].append(_model_record("text", path, weights.name, precision, converted, parities))
    return manifest


def _texts(config: ExportConfig, dataset) -> list[str]:
    """Prompts of the data set, or its captions where it has no classes."""
    prompts = [template.format(name) for name in dataset.class_names for template in dataset.templates]
    prompts = prompts or [text for item in dataset.images[: config.images] for text in item.captions]
    return prompts[: max(2, config.images)]


def export(config: ExportConfig, clip: LoadedClip | None = None) -> dict[str, Any]:
    """Write the export that `config` asks for into `config.out`; returns its manifest.

    Raises: UserError for input outside the rules; ParityError where a graph differs, and then `out` is untouched.
    """
    check(config)
    clip = load_clip(config.model, config.pretrained) if clip is None else clip
    dataset, pictures = load_images(config, clip.preprocess)
    note = ""
    with staging(config.out) as staged, torch.no_grad():
        if config.tower == "text":
            manifest = export_text(config, clip, staged, _texts(config, dataset))
        else:
            manifest, note = export_image(config, clip, staged, pictures, dataset)
        publish(staged, config.out, manifest, f"{config.tower}.json")
    return manifest | {"note": note}


def _compared(manifest: dict[str, Any]) -> list[tuple[dict, str, dict]]:
    """Every graph with every runtime that it was compared in."""
    return [(model, *entry) for model in manifest["models"] for entry in model["parity_by_runtime"].items()]


def report(manifest: dict[str, Any], out: Path) -> str:
    """One line per graph, for people."""
    lines = [manifest["note"]] if manifest.get("note") else []
    for model, runtime, parity in _compared(manifest):
        share = f", {model['image_macs'] / model['dense_image_macs']:.3f} of dense MACs" if "spec" in model else ""
        top1 = "" if parity["top1_agreement"] is None else f", same answer {100 * parity['top1_agreement']:.2f} %"
        kept = f", same patches {100 * parity['kept_agreement']:.2f} %" if model.get("spec", {}).get("cuts") else ""
        lines.append(
            f"{out / model['graph']}: max-abs {parity['max_abs']:.2g}, cosine >= {parity['cosine_min']:.7f}"
            f"{kept}{top1} on {parity['num_images']} inputs at batch 1, 5, 16 in {runtime}{share}"
        )
    return "\n".join(lines)


def main(config: ExportConfig) -> None:
    """Export and say what was written."""
    print(report(export(config), config.out))


if __name__ == "__main__":
    cli.run(main, ExportConfig, prog="python -m export.onnx_file")
