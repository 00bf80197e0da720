"""`python -m export.parity_report`: how far exported graphs are from PyTorch on many real images, as one table.

Every row is what the gate would have judged, and says whether it would have passed; nothing is published here. Rows are
kept as they come: the same command goes on where it stopped.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from export.config import ExportConfig, check
from export.onnx_file import write_graphs
from export.parity import compare, failures, limits_of
from export.ranges import PRODUCTS
from export.reference import reference
from export.runtimes import RUNTIMES
from export.serving import ServingGraph
from export.source import Pictures, Variant, as_numpy, calibration_images, load_images, variants
from export.tracing import trace
from patchrank import cli
from patchrank.atomic import write_json
from patchrank.loading import load_clip
from patchrank.provenance import command, machine, versions

_CHOOSE_ROWS = ("keep", "macs", "precision", "runtime")


@dataclass(frozen=True, kw_only=True)
class ParityConfig(ExportConfig):
    """Compare graphs with PyTorch on many images: one cut under drop and fold, and the `accurate` preset."""

    keep: tuple[float, ...] = (0.6,)
    """Shares of patches that one cut leaves, under drop and under fold."""
    macs: tuple[float, ...] = (0.7,)
    """Shares of the dense image tower's MACs (preset `accurate`, fold)."""
    images: int = 1000
    """Images of the comparison, spread over the classes."""
    precision: tuple[str, ...] = ("float32", "int8", "float16")
    """Precisions: float32, float16 (slow on most CPUs), int8 (dynamic), int8-static (scales fixed in the graph)."""
    out: Path = Path("out/parity")
    """Folder of parity.json; the rows that it holds already are kept."""


def exports_of(config: ParityConfig) -> list[ExportConfig]:
    """One export per row of the table's variants."""
    shared = {name: getattr(config, name) for name in ExportConfig.__dataclass_fields__}
    plain = ExportConfig(**(shared | {"keep": (), "macs": ()}))
    one_cut = [replace(plain, keep=(keep,), rest=rest) for keep in config.keep for rest in ("drop", "fold")]
    return one_cut + [replace(plain, macs=(macs,), rest="fold") for macs in config.macs]


def rows(config: ParityConfig, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows that are not among `done`, precision by precision in the order given."""
    clip = load_clip(config.model, config.pretrained)
    dataset, pictures = load_images(config, clip.preprocess)
    found = calibration_images(config, clip.preprocess)
    calibration = None if found is None else as_numpy(found.image_BHW3)
    named = {}
    for export in exports_of(config):
        ((variant,), _) = variants(export, clip, dataset)
        named[row_name(export, variant)] = variant.graph
    finished, prepared = {key_of(row) for row in done}, {}
    for precision in config.precision:
        for name, graph in named.items():
            wanted = [runtime for runtime in config.runtime if key(name, precision, runtime) not in finished]
            if wanted and name not in prepared:
                traced = trace(graph, graph.example(), graph.input_name, graph.output_names, config.opset)
                prepared[name] = traced, reference(graph, pictures.image_BHW3)
            if wanted:
                for runtime, figures in _figures(graph, *prepared[name], precision, wanted, pictures, calibration):
                    yield {"variant": name, "precision": precision, "runtime": runtime, **figures}


def _figures(
    graph: ServingGraph, traced, known, precision: str, wanted: list[str], pictures: Pictures, calibration
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(runtime, figures) of one graph in one precision."""
    with tempfile.TemporaryDirectory() as folder:
        (_, path), (model,) = write_graphs(Path(folder), {"graph": traced}, precision, "w", calibration)
        for runtime in wanted:
            parity = compare(RUNTIMES[runtime](path, None), graph, pictures, precision, known)
            broken = failures(parity, limits_of(precision, parity.torch_float16_max_abs))
            yield (
                runtime,
                {
                    "spec": graph.pruned.spec.to_dict(),
                    "num_float32_products": sum(node.op_type in PRODUCTS for node in model.graph.node),
                    "passed": not broken,
                    "broken": broken,
                    **parity.to_dict(),
                },
            )


def row_name(export: ExportConfig, variant: Variant) -> str:
    """Such as "drop-keep-0.6"."""
    return f"{export.rest}-{variant.name}"


def key(*parts: str) -> str:
    """Name of a row among the rows of one comparison."""
    return " ".join(parts)


def key_of(row: dict[str, Any]) -> str:
    """`key` of a finished row."""
    return key(row["variant"], row["precision"], row["runtime"])


def parity_report(config: ParityConfig) -> dict[str, Any]:
    """Compute what is missing, row by row; returns what parity.json holds."""
    for export in exports_of(config):
        check(export)
    settings = json.loads(json.dumps({name: value for name, value in config.to_dict().items() if name != "out"}))
    path = config.out / "parity.json"
    stored = json.loads(path.read_text()) if path.is_file() else {}
    done = stored["rows"] if stored and _same(stored["config"], settings) else []
    total = len(exports_of(config)) * len(config.precision) * len(config.runtime)
    found = {"command": command("export.parity_report"), "versions": versions(), "machine": machine()}
    found |= {"config": settings, "rows": done}
    with torch.no_grad(), tqdm(total=total, initial=len(done), unit="row") as bar:
        for row in rows(config, list(done)):
            done.append(row)
            write_json(path, found)
            bar.update()
    return found


def _same(stored: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether stored rows answer the same question; an option that was not there yet had its default."""
    defaults = {name: value for name, value in ParityConfig().to_dict().items() if name in settings}
    before = json.loads(json.dumps(defaults)) | stored
    return all(before[name] == settings[name] for name in settings if name not in _CHOOSE_ROWS)


def table(result: dict[str, Any]) -> str:
    """The rows for people."""
    names = ("variant", "precision", "runtime", "max-abs", "cosine", "lowest", "kept", "same", "acc", "torch", "passed")
    lines = ["{:14} {:11} {:11} {:>8} {:>9} {:>8} {:>7} {:>7} {:>6} {:>6} {:>6}".format(*names)]
    for row in result["rows"]:
        shares = [row[name] for name in ("kept_agreement", "top1_agreement", "accuracy", "torch_accuracy")]
        shares = ["-" if share is None else f"{100 * share:.2f}" for share in shares]
        lines.append(
            f"{row['variant']:14} {row['precision']:11} {row['runtime']:11} {row['max_abs']:8.1e} "
            f"{row['cosine_mean']:9.6f} {row['cosine_min']:8.5f} "
            f"{shares[0]:>7} {shares[1]:>7} {shares[2]:>6} {shares[3]:>6} {'yes' if row['passed'] else 'NO':>6}"
        )
    return "\n".join(lines)


def main(config: ParityConfig) -> None:
    """Compare, write parity.json, print the table."""
    result = parity_report(config)
    write_json(config.out / "parity.json", result)
    print(table(result))


if __name__ == "__main__":
    cli.run(main, ParityConfig, prog="python -m export.parity_report")
