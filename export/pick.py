"""One cut chosen from measured latency: block times at every token count, then the most compute that fits the target.

A block's time does not follow its MACs where a machine prefers some sizes, and the cut itself takes time; so both are
measured. The choice is built and measured again beside the dense graph, and pruning that does not pay is said to.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.bench_config import BenchConfig
from export.bench_graphs import Entry, graph_of, traced
from export.onnx_file import write_graphs
from export.runtimes import RUNTIMES
from export.tracing import trace
from patchrank.macs import pruned_macs
from patchrank.presets import one_cut
from patchrank.spec import PruneSpec
from patchrank.tower import VisionTower

STEP = 8
"""Tokens behind a cut, prefix included, are a multiple of this."""
_ROUNDS = 5


def counts_of(tower: VisionTower) -> list[int]:
    """Kept patches that make the tokens a multiple of STEP, falling."""
    config = tower.config
    lengths = range((config.num_prefix + config.num_patches - 1) // STEP * STEP, config.num_prefix, -STEP)
    return [length - config.num_prefix for length in lengths]


def block_times(
    tower: VisionTower, lengths: list[int], batch: int, threads: int, runtime: str, opset: int
) -> dict[int, float]:
    """Tokens -> milliseconds of one block, the median of interleaved rounds."""
    width = tower.config.width
    example = torch.zeros(2, lengths[0], width)
    with torch.no_grad():
        model = trace(tower.blocks[0], example, "tokens", ["feature"], opset, free_length=True)
    with tempfile.TemporaryDirectory() as folder:
        (_, path), _ = write_graphs(Path(folder), {"block": model}, "float32", "block")
        runner = RUNTIMES[runtime](path, threads)
    values = {length: np.random.default_rng(0).standard_normal((batch, length, width)) for length in lengths}
    values = {length: value.astype(np.float32) for length, value in values.items()}
    times: dict[int, list[float]] = {length: [] for length in lengths}
    for number in range(_ROUNDS + 1):
        for length in lengths:
            elapsed = timed(lambda length=length: runner.run(values[length], ("feature",)))
            if number:
                times[length].append(elapsed)
    return {length: float(np.median(found)) for length, found in times.items()}


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def choose(
    tower: VisionTower, dense_ms: float, block_ms: dict[int, float], target_ms: float, rest: str = "fold"
) -> tuple[PruneSpec, float] | None:
    """The one-cut spec of the most MACs whose predicted latency is at most `target_ms`, with that prediction.

    Predicted: the dense latency, less what the blocks behind the cut save. None where no spec fits.
    """
    config = tower.config
    full = block_ms[config.num_prefix + config.num_patches]
    fitting = []
    for layer in range(1, config.num_layers - 1):
        for K in counts_of(tower):
            saved = (config.num_layers - layer) * (full - block_ms[config.num_prefix + K])
            if dense_ms - saved <= target_ms:
                spec = one_cut(config, K / config.num_patches, layer=layer, rest=rest)
                fitting.append((pruned_macs(config, spec), spec, dense_ms - saved))
                break
    if not fitting:
        return None
    _, spec, predicted = max(fitting, key=lambda entry: entry[0])
    return spec, predicted


def pick(
    config: BenchConfig, tower: VisionTower, dense: Entry, image: np.ndarray, measure: Callable[..., np.ndarray]
) -> dict[str, Any]:
    """Choose for --pick-ms, build the choice, measure it beside the dense graph, and say what came of it."""
    runtime, batch = config.runtime[0], len(image)
    (dense_ms,) = np.median(measure([(dense.path, runtime)], image, _ROUNDS, config.threads), axis=1)
    lengths = [tower.config.num_prefix + K for K in (tower.config.num_patches, *counts_of(tower))]
    block_ms = block_times(tower, lengths, batch, config.threads, runtime, config.opset)
    found = choose(tower, float(dense_ms), block_ms, config.pick_ms)
    asked = {"target_ms": config.pick_ms, "batch": batch, "dense_ms": float(dense_ms)}
    if found is None:
        fastest = (
            f"no single cut reaches {config.pick_ms:g} ms at batch {batch}; the dense graph takes {dense_ms:.1f} ms"
        )
        return asked | {"cut": None, "says": fastest}
    spec, predicted = found
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        models = {"picked": traced(graph_of(tower, spec, config.seed), config.opset)}
        (_, path), _ = write_graphs(Path(folder), models, dense.precision, "picked")
        paths = [(dense.path, runtime), (path, runtime)]
        ms = np.median(measure(paths, image, config.rounds, config.threads), axis=1)
    ((layer, K),) = spec.counts(tower.config.num_patches)
    says = f"picked: --layer {layer} --keep {K / tower.config.num_patches:.4f} ({K} patches): {ms[1]:.1f} ms"
    says += f" at batch {batch}, dense {ms[0]:.1f} ms, asked for {config.pick_ms:g} ms"
    if ms[1] >= ms[0]:
        says = f"pruning does not pay at batch {batch}: {ms[1]:.1f} ms against {ms[0]:.1f} ms of the dense graph"
    measured = {"predicted_ms": predicted, "measured_ms": float(ms[1]), "measured_dense_ms": float(ms[0])}
    return (
        asked | {"cut": {"layer": layer, "num_kept": K, "keep": K / tower.config.num_patches}, "says": says} | measured
    )
