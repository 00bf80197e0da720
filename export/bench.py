"""`python -m export.bench`: images per second of dense and pruned graphs in CPU runtimes, interleaved in one run.

Every graph gets one call per round, in turn, so that a busy machine slows all of them alike; the ratio beside the ideal
one from MACs says how much of the saving arrives. Only ratios of one run mean anything. What one batch size gave is
kept at once: the same command goes on where it stopped, and several models gather in one file.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from export.bench_config import BenchConfig, check
from export.bench_graphs import Entry, entries, load_tower
from export.pick import pick
from export.runtimes import RUNTIMES
from patchrank import cli
from patchrank.atomic import write_json
from patchrank.provenance import command, machine, versions
from patchrank.tower import VisionTower

NAMES = {"onnxruntime": "onnxruntime-cpu", "openvino": "openvino-cpu"}
"""What the result file calls runtimes that compute on the processor."""


def measure(paths: list[tuple[Path, str]], image: np.ndarray, rounds: int, threads: int) -> np.ndarray:
    """Milliseconds (graphs, rounds), one call of every graph per round; a round before these is thrown away.

    Args: paths, (file, runtime) of every graph.
    """
    runners = [RUNTIMES[runtime](path, threads) for path, runtime in paths]
    elapsed = np.zeros((len(runners), rounds + 1))
    for number in range(rounds + 1):
        for row, runner in enumerate(runners):
            start = time.perf_counter()
            runner.run(image, ("feature",))
            elapsed[row, number] = 1000 * (time.perf_counter() - start)
    return elapsed[:, 1:]


def row_of(model: str, entry: Entry, runtime: str, batch: int, ms: np.ndarray, dense_ms: np.ndarray) -> dict[str, Any]:
    """One line of the table; speedup is the median over rounds of the ratio to `dense_ms` of the same round."""
    p50, p90, p99 = (float(value) for value in np.percentile(ms, (50, 90, 99)))
    ratio = dense_ms / ms
    return {
        "model": model,
        "variant": entry.variant,
        "runtime": NAMES.get(runtime, runtime),
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


def images_of(config: BenchConfig, tower: VisionTower, batch: int) -> np.ndarray:
    """Random pictures (B, H, W, 3) uint8."""
    generator = np.random.default_rng(config.seed)
    return generator.integers(0, 256, (batch, *tower.config.image_size, 3), dtype=np.uint8)


def group_of(config: BenchConfig, batch: int) -> str:
    """What rows that were measured together have in common, as text."""
    unlike = ("out", "graphs", "batch", "prepare_only", "pick_ms")
    shared = {name: value for name, value in asdict(config).items() if name not in unlike}
    return json.dumps(shared | {"pretrained": Path(config.pretrained).name, "batch": batch}, sort_keys=True)


def bench(config: BenchConfig, tower: VisionTower | None = None) -> dict[str, Any]:
    """Measure what is missing in `config.out`; returns what export_bench.json holds."""
    check(config)
    tower = load_tower(config) if tower is None else tower
    graphs = entries(config, tower)
    store = config.out / "bench_groups.json"
    groups = json.loads(store.read_text()) if store.is_file() else {}
    for batch in config.batch if not config.prepare_only else ():
        if group_of(config, batch) in groups:
            continue
        pairs = [(entry, runtime) for runtime in config.runtime for entry in graphs]
        paths = [(entry.path, runtime) for entry, runtime in pairs]
        ms = measure(paths, images_of(config, tower, batch), config.rounds, config.threads)
        # Everything is held against the dense graph in the first precision and the first runtime named.
        rows = [row_of(config.model, *pair, batch, times, ms[0]) for pair, times in zip(pairs, ms)]
        rows = [row | {"threads": config.threads, "rounds": config.rounds} for row in rows]
        groups[group_of(config, batch)] = {"command": command("export.bench"), "rows": rows}
        write_json(store, groups)
    result = {
        "command": " && ".join(dict.fromkeys(group["command"] for group in groups.values())),
        "versions": versions(),
        "machine": machine(),
        "threads": config.threads,
        "rounds": config.rounds,
        "rows": [row for group in groups.values() for row in group["rows"]],
    }
    if config.pick_ms is not None and not config.prepare_only:
        result["picked"] = pick(config, tower, graphs[0], images_of(config, tower, config.batch[0]), measure)
    return result


def table(result: dict[str, Any]) -> str:
    """The rows for people, and a word where pruning does not pay."""
    names = ("model", "runtime", "precision", "variant", "keep", "batch", "ms p50", "speed-up", "ideal", "share")
    lines = ["{:13} {:15} {:9} {:9} {:>5} {:>5} {:>9} {:>9} {:>6} {:>6}".format(*names)]
    for row in result["rows"]:
        share = row["speedup"] / row["ideal_speedup"]
        lines.append(
            f"{row['model'][:13]:13} {row['runtime']:15} {row['precision']:9} {row['variant']:9} {row['keep']:5.2f} "
            f"{row['batch']:5} {row['ms_p50']:9.2f} {row['speedup']:9.3f} {row['ideal_speedup']:6.3f} {share:6.3f}"
        )
        if row["num_cuts"] and row["speedup"] <= 1.0:
            lines.append(f"  at batch {row['batch']} this pruning does not pay: it is not faster than the dense graph")
    if "picked" in result:
        lines.append(result["picked"]["says"])
    return "\n".join(lines)


def main(config: BenchConfig) -> None:
    """Measure, write export_bench.json, print the table."""
    result = bench(config)
    if config.prepare_only:
        print(f"graphs written to {config.graphs}")
        return
    write_json(config.out / "export_bench.json", result)
    print(table(result))


if __name__ == "__main__":
    cli.run(main, BenchConfig, prog="python -m export.bench")
