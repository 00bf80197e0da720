"""Images per second of every row, each call right behind one of the dense tower, so that load hits both alike.

Only the ratio within such a pair means anything on a machine that others use too; images per second are the dense
tower's median times the median ratio.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from eval.features import Method
from eval.measuring import Bench
from eval.records import DENSE
from eval.report_data import THROUGHPUT
from eval.suite_config import RUNTIMES, SuiteConfig, file_stem
from export.runtimes import check_runtimes, open_session
from export.serving import ServingGraph
from patchrank.atomic import write_json
from patchrank.macs import dense_macs
from patchrank.preprocess import Preprocess
from patchrank.provenance import command, machine, versions
from patchrank.pruned import PrunedTower
from patchrank.scorers import SCORERS
from patchrank.spec import PruneSpec
from patchrank.tower import VisionTower

TORCH = RUNTIMES[0]
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One method at one budget in one runtime: times of its calls and of the dense calls just before them."""

    method: str
    macs: float
    image_macs: int
    dense_macs: int
    runtime: str
    batch: int
    threads: int
    ms: list[float]
    """Milliseconds of one call of `batch` images, per round."""
    dense_ms: list[float]

    @property
    def speedups(self) -> np.ndarray:
        """Ratio to the dense call of the same round."""
        return np.array(self.dense_ms) / np.array(self.ms)

    def to_dict(self) -> dict:
        """JSON-able form, with what readers want beside the times."""
        low, middle, high = (float(value) for value in np.percentile(self.speedups, (25, 50, 75)))
        return asdict(self) | {
            "speedup": middle,
            "speedup_quartiles": [low, high],
            "ideal_speedup": self.dense_macs / self.image_macs,
            "ms_p50": float(np.median(self.ms)),
        }


def paired_times(dense: Call, call: Call, rounds: int, synchronize: Call) -> tuple[list[float], list[float]]:
    """Milliseconds of `dense` and of `call`, one of each per round; a round before these is thrown away."""
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for place, one in enumerate((dense, call)):
            synchronize()
            start = time.perf_counter()
            one()
            synchronize()
            times[place].append(1000 * (time.perf_counter() - start))
    return times[0][1:], times[1][1:]


def example(image_size: tuple[int, int], batch: int, seed: int = 0) -> np.ndarray:
    """Random pictures (batch, H, W, 3) uint8: speed does not depend on what they show."""
    return np.random.default_rng(seed).integers(0, 256, (batch, *image_size, 3), dtype=np.uint8)


def torch_call(module: nn.Module, image_BCHW: Tensor) -> Call:
    """One forward pass without gradients."""

    def call() -> None:
        with torch.inference_mode():
            module(image_BCHW)

    return call


def onnx_call(pruned: PrunedTower, preprocess: Preprocess, image_BHW3: np.ndarray, folder: Path, threads: int) -> Call:
    """The exported graph of a pruned tower (without cuts: the dense one) in ONNX Runtime on the CPU.

    Raises: UserError where ONNX Runtime is not installed.
    """
    check_runtimes(("onnxruntime",))
    from export.onnx_file import write_graphs
    from export.tracing import trace

    graph = ServingGraph(pruned, preprocess).eval()
    traced = trace(graph, graph.example(), graph.input_name, graph.output_names, 18)
    (_, path), _ = write_graphs(folder, {"graph": traced}, "float32", "speed")
    session = open_session(path, threads)
    return lambda: session.run(["feature"], {"image": image_BHW3})


def write_speed(config: SuiteConfig, bench: Bench, runtime: str) -> None:
    """Time every row of a bench that the runtime's file lacks; the file is whole after each row.

    Oracles search every image, so there is no speed of theirs to measure.
    """
    clip, num_threads, path = bench.clip, torch.get_num_threads(), speed_path(config, bench, runtime)
    rows = {(row["method"], row["macs"]): row for row in read_rows(path)}
    image_BHW3 = example(clip.tower.config.image_size, config.speed_batch, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        timer = Timer(runtime, bench, image_BHW3, Path(folder), num_threads, config.rounds)
        left = [one for one in bench.methods if one.name != DENSE and (one.name, one.macs) not in rows]
        for method in tqdm(left, desc=f"speed in {runtime}", unit="row", disable=None):
            if timer.can(method.module):
                rows[method.name, method.macs] = timer.row(method).to_dict()
                write_json(path, speed_file(config, bench, runtime, num_threads, list(rows.values())))


def speed_path(config: SuiteConfig, bench: Bench, runtime: str) -> Path:
    """The throughput file of a model, runtime, number of threads and batch."""
    setting = f"{runtime}_t{torch.get_num_threads()}_b{config.speed_batch}"
    return config.out / f"speed_{file_stem(bench.clip)}_{setting}.json"


def read_rows(path: Path) -> list[dict]:
    """Rows of a throughput file; none where it is absent or no JSON."""
    try:
        return json.loads(path.read_bytes())["rows"]
    except (OSError, ValueError, KeyError):
        return []


def speed_file(config: SuiteConfig, bench: Bench, runtime: str, num_threads: int, rows: list[dict]) -> dict:
    """What the throughput file holds; images/s of a row: the dense tower's median times the row's speed-up."""
    dense = dense_images_per_s(rows)
    return {
        "kind": THROUGHPUT,
        "schema": 1,
        "model": bench.clip.model_name,
        "weights_hash": bench.clip.weights_hash,
        "runtime": runtime,
        "precision": "float32",
        "device": config.device if runtime == TORCH else "cpu",
        "batch": config.speed_batch,
        "threads": num_threads,
        "rounds": config.rounds,
        "dense_images_per_s": dense,
        "command": command("eval"),
        "versions": versions(),
        "machine": machine(),
        "rows": [row | {"images_per_s": dense * row["speedup"]} for row in rows],
    }


class Timer:
    """Calls of one runtime, the dense tower's made once."""

    def __init__(self, runtime: str, bench: Bench, image_BHW3: np.ndarray, folder: Path, threads: int, rounds: int):
        self.runtime, self.bench, self.folder, self.threads, self.rounds = runtime, bench, folder, threads, rounds
        self.device = bench.config.device
        self.image_BHW3 = image_BHW3
        self.image_BCHW = torch.from_numpy(image_BHW3).permute(0, 3, 1, 2).contiguous().float().div(255).to(self.device)
        self.dense = self._call(bench.clip.tower)

    def can(self, module: nn.Module) -> bool:
        """Whether this runtime has the method."""
        return self.runtime == TORCH or graph_of(module) is not None

    def _call(self, module: nn.Module) -> Call:
        if self.runtime == TORCH:
            return torch_call(module, self.image_BCHW)
        clip = self.bench.clip
        pruned = graph_of(module) or no_cut(clip.tower)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return onnx_call(pruned, clip.preprocess, self.image_BHW3, folder, self.threads)

    def row(self, method: Method) -> SpeedRow:
        """Time one method."""
        wait = torch.cuda.synchronize if self.device.startswith("cuda") else lambda: None
        dense_ms, ms = paired_times(self.dense, self._call(method.module), self.rounds, wait)
        return SpeedRow(
            method=method.name,
            macs=method.macs,
            image_macs=method.image_macs,
            dense_macs=dense_macs(self.bench.clip.tower.config),
            runtime=self.runtime,
            batch=len(self.image_BHW3),
            threads=self.threads,
            ms=ms,
            dense_ms=dense_ms,
        )


def graph_of(module: nn.Module) -> PrunedTower | None:
    """What of a method can be exported: a plain `PrunedTower`; None for walks of other kinds."""
    pruned = getattr(module, "pruned", None)
    return pruned if type(pruned) is PrunedTower else None


def no_cut(tower: VisionTower) -> PrunedTower:
    """The dense tower as a pruned one that prunes nothing, for an exporter."""
    return PrunedTower(tower, PruneSpec(cuts=()), SCORERS["random"](tower.config.grid, 0))


def dense_images_per_s(rows: list[dict]) -> float:
    """Median over all dense calls of the rows (of one runtime, batch and number of threads)."""
    return float(np.median([1000 * row["batch"] / ms for row in rows for ms in row["dense_ms"]]))
