"""`python -m export.bench`: images per second of dense and pruned graphs in ONNX Runtime, interleaved in one run.

Every graph gets one call per round, in turn, so that a busy machine slows all of them alike; the ratio beside the ideal
one from MACs says how much of the saving arrives. Only ratios of one run mean anything.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.onnx_file import write_graphs
from export.precision import PRECISIONS
from export.serving import ServingGraph
from export.tracing import trace
from patchrank import cli
from patchrank.atomic import write_json
from patchrank.errors import UserError
from patchrank.loading import load_clip
from patchrank.macs import dense_macs, pruned_macs
from patchrank.preprocess import Preprocess
from patchrank.presets import one_cut, spec_for_macs
from patchrank.provenance import command, machine, versions
from patchrank.pruned import PrunedTower
from patchrank.scorers import SCORERS
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig, VisionTower

_CLIP = dict(patch_size=16, width=768, num_layers=12, num_heads=12, mlp_width=3072, pre_norm=True, output_dim=512)
_LARGE = dict(_CLIP, patch_size=14, width=1024, num_layers=24, num_heads=16, mlp_width=4096, output_dim=768)
SHAPES: dict[str, TowerConfig] = {
    "ViT-B-16": TowerConfig(image_size=(224, 224), **_CLIP),
    "ViT-B-32": TowerConfig(image_size=(224, 224), **dict(_CLIP, patch_size=32)),
    "ViT-L-14": TowerConfig(image_size=(224, 224), **_LARGE),
    "ViT-L-14-336": TowerConfig(image_size=(336, 336), **_LARGE),
}
"""Towers with random weights: speed does not depend on the values."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure how much of the saved compute arrives as speed."""

    model: str = "embedded"
    """A model as in the other commands, or a shape with random weights: ViT-B-16, ViT-B-32, ViT-L-14, ViT-L-14-336."""
    pretrained: str = ""
    """Weights of --model; a shape needs none."""
    keep: tuple[float, ...] = (0.6,)
    """Shares of patches of the one-cut graphs; four cuts are measured at the same MACs."""
    layer: int | None = None
    """Blocks that run before the cut; without it a quarter of the depth."""
    batch: tuple[int, ...] = (1, 16)
    """Images per call."""
    precision: tuple[str, ...] = ("float32",)
    """Precisions: float32, float16, int8. Speed-ups of all are over the dense graph in the first."""
    rounds: int = 7
    """Timed calls of every graph; one more is made first and thrown away."""
    threads: int = 1
    """Threads of ONNX Runtime."""
    opset: int = 18
    """ONNX operator set: 18 or 23."""
    seed: int = 0
    """Seed of images, scores and random weights."""
    out: Path = Path("out/bench")
    """Folder of export_bench.json."""


@dataclass(frozen=True)
class Entry:
    """One graph under measurement."""

    precision: str
    spec: PruneSpec
    keep: float
    macs: int
    dense: int
    path: Path


def check(config: BenchConfig) -> None:
    """Check all that needs no model. Raises: UserError."""
    for name in ("rounds", "threads"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be 1 or more")
    for precision in config.precision:
        if precision not in PRECISIONS:
            raise UserError(f"--precision {precision}: unknown; choose one of {', '.join(PRECISIONS)}")
    if not config.batch or min(config.batch) < 1:
        raise UserError(f"--batch {' '.join(map(str, config.batch))}: needs sizes of 1 or more")
    for keep in config.keep:
        if not 0.0 < keep < 1.0:
            raise UserError(f"--keep {keep:g}: must lie in (0, 1) here; the dense graph is measured anyway")


def load_tower(config: BenchConfig) -> VisionTower:
    """The tower of --model, or a shape with seeded random weights."""
    if config.model not in SHAPES or config.pretrained:
        return load_clip(config.model, config.pretrained).tower
    torch.manual_seed(config.seed)
    tower = VisionTower(SHAPES[config.model]).eval().requires_grad_(False)
    for block in tower.blocks:
        torch.nn.init.normal_(block.qkv.weight, std=0.02)
    return tower


def specs_of(tower: TowerConfig, keeps: tuple[float, ...], layer: int | None) -> list[tuple[float, PruneSpec]]:
    """Dense first, then per keep: drop with one cut, fold with one cut, fold with four cuts and with the `accurate`
    preset at the same MACs."""
    found = [(1.0, PruneSpec(cuts=()))]
    for keep in keeps:
        fold = one_cut(tower, keep, layer=layer)
        share = pruned_macs(tower, fold) / dense_macs(tower)
        found.append((keep, replace(fold, rest="drop", select="topk")))
        found.append((keep, fold))
        found.append((keep, four_cuts(tower, fold)))
        found.append((keep, spec_for_macs(tower, share)))
    return found


def four_cuts(tower: TowerConfig, like: PruneSpec) -> PruneSpec:
    """The one-cut spec `like` with four equal cuts, two blocks apart from its layer on, at no more MACs than it.

    Source: the schedule of Patch Ranking (layers 3, 5, 7, 9), with our fold.
    """
    num_patches, first = tower.num_patches, like.cuts[0][0]
    layers = [layer for layer in range(first, first + 8, 2) if layer < tower.num_layers]
    for K in range(num_patches - len(layers), len(layers), -1):
        step = (num_patches - K) / len(layers)
        counts = [round(num_patches - step * number) for number in range(1, len(layers) + 1)]
        spec = replace(like, cuts=tuple((layer, count / num_patches) for layer, count in zip(layers, counts)))
        if pruned_macs(tower, spec) <= pruned_macs(tower, like):
            return spec
    return like


def graphs_of(config: BenchConfig, tower: VisionTower) -> list[ServingGraph]:
    """The graph of every spec, dense first."""
    size = tower.config.image_size
    preprocess = Preprocess(image_size=size, resize=max(size), mean=(0.5,) * 3, std=(0.5,) * 3)
    scorer = SCORERS["random"](tower.config.grid, seed=config.seed)
    specs = [spec for _, spec in specs_of(tower.config, config.keep, config.layer)]
    return [ServingGraph(PrunedTower(tower, spec, scorer), preprocess).eval() for spec in specs]


def write_entries(config: BenchConfig, tower: VisionTower, folder: Path) -> list[Entry]:
    """Trace every spec once, write it in every precision."""
    traced = {
        f"bench-{number}": trace(graph, graph.example(), graph.input_name, graph.output_names, config.opset)
        for number, graph in enumerate(graphs_of(config, tower))
    }
    entries = []
    for precision in config.precision:
        (_, *paths), _ = write_graphs(folder, traced, precision, "bench")
        for (keep, spec), path in zip(specs_of(tower.config, config.keep, config.layer), paths):
            macs, dense = pruned_macs(tower.config, spec), dense_macs(tower.config)
            entries.append(Entry(precision, spec, keep, macs, dense, path))
    return entries


def measure(entries: list[Entry], image: np.ndarray, rounds: int, threads: int) -> np.ndarray:
    """Milliseconds (entries, rounds), one call of every entry per round; a round before these is thrown away."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    sessions = [onnxruntime.InferenceSession(str(e.path), options, ["CPUExecutionProvider"]) for e in entries]
    elapsed = np.zeros((len(entries), rounds + 1))
    for number in range(rounds + 1):
        for row, session in enumerate(sessions):
            start = time.perf_counter()
            session.run(["feature"], {"image": image})
            elapsed[row, number] = 1000 * (time.perf_counter() - start)
    return elapsed[:, 1:]


def row_of(config: BenchConfig, entry: Entry, batch: int, ms: np.ndarray, dense_ms: np.ndarray) -> dict[str, Any]:
    """One line of the table; speedup is the median over rounds of the ratio to `dense_ms` of the same round."""
    p50, p90, p99 = (float(value) for value in np.percentile(ms, (50, 90, 99)))
    ratio = dense_ms / ms
    return {
        "model": config.model,
        "runtime": "onnxruntime-cpu",
        "precision": entry.precision,
        "rest": entry.spec.rest if entry.spec.cuts else None,
        "cuts": [list(cut) for cut in entry.spec.cuts],
        "num_added": entry.spec.num_added,
        "batch": batch,
        "keep": entry.keep,
        "num_cuts": len(entry.spec.cuts),
        "image_macs": entry.macs,
        "dense_image_macs": entry.dense,
        "ms_p50": p50,
        "ms_p90": p90,
        "ms_p99": p99,
        "images_per_s": 1000 * batch / p50,
        "speedup": float(np.median(ratio)),
        "speedup_quartiles": [float(value) for value in np.percentile(ratio, (25, 75))],
        "ideal_speedup": entry.dense / entry.macs,
    }


def bench(config: BenchConfig, tower: VisionTower | None = None) -> dict[str, Any]:
    """Measure everything that `config` asks for; returns what export_bench.json holds."""
    check(config)
    tower = load_tower(config) if tower is None else tower
    generator = np.random.default_rng(config.seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        entries = write_entries(config, tower, Path(folder))
        for batch in config.batch:
            image = generator.integers(0, 256, (batch, *tower.config.image_size, 3), dtype=np.uint8)
            ms = measure(entries, image, config.rounds, config.threads)
            # Everything is held against the dense graph in the first precision named.
            rows += [row_of(config, entry, batch, times, ms[0]) for entry, times in zip(entries, ms)]
    return {
        "command": command("export.bench"),
        "versions": versions(),
        "machine": machine(),
        "threads": config.threads,
        "rounds": config.rounds,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The rows for people, and a word where pruning does not pay."""
    names = ("precision", "rest", "cuts", "keep", "batch", "ms p50", "speed-up", "ideal")
    lines = ["{:9} {:5} {:>4} {:>5} {:>5} {:>9} {:>9} {:>6}".format(*names)]
    for row in result["rows"]:
        lines.append(
            f"{row['precision']:9} {row['rest'] or 'dense':5} {row['num_cuts']:4} {row['keep']:5.2f} {row['batch']:5} "
            f"{row['ms_p50']:9.2f} {row['speedup']:9.3f} {row['ideal_speedup']:6.3f}"
        )
        if row["num_cuts"] and row["speedup"] <= 1.0:
            lines.append(f"  at batch {row['batch']} this pruning does not pay: it is not faster than the dense graph")
    return "\n".join(lines)


def main(config: BenchConfig) -> None:
    """Measure, write export_bench.json, print the table."""
    result = bench(config)
    write_json(config.out / "export_bench.json", result)
    print(table(result))


if __name__ == "__main__":
    cli.run(main, BenchConfig, prog="python -m export.bench")
