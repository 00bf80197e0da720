"""`python -m export.torch_bench`: dense and pruned towers in PyTorch, eager or compiled, on a processor or a GPU.

For GPUs: the tower's input lies on the device, every timed call is one batch, and the rate of products is held against
what one large matrix product reaches in the same type in the same run. Dense and pruned calls take turns.

Letters: B batch, H rows, W columns.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from export.bench import row_of
from export.bench_config import VARIANTS, BenchConfig
from export.bench_graphs import Entry, load_tower, macs_of, scorer_of, specs_of
from patchrank import cli
from patchrank.atomic import write_json
from patchrank.errors import UserError
from patchrank.macs import dense_macs
from patchrank.provenance import command, machine, versions
from patchrank.pruned import PrunedTower
from patchrank.tower import VisionTower

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PEAK = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the product that stands for the peak."""

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class TorchBenchConfig:
    """Images per second of dense and pruned towers in PyTorch."""

    model: str = "embedded"
    """A model as in the other commands, or a shape with random weights: ViT-B-16, ViT-B-32, ViT-L-14, ViT-L-14-336."""
    pretrained: str = ""
    """Weights of --model; a shape needs none."""
    keep: tuple[float, ...] = (0.6,)
    """Shares of patches of the one-cut towers; several cuts are measured at the same MACs."""
    layer: int | None = None
    """Blocks that run before the cut; without it a quarter of the depth."""
    variants: tuple[str, ...] = VARIANTS
    """Towers beside the dense one: drop-1, fold-1 (one cut), fold-4 (four cuts), accurate (the preset)."""
    batch: tuple[int, ...] = (16,)
    """Images per call; 256 and more fill a GPU."""
    precision: str = "float32"
    """Type of weights and tokens: float32, bfloat16, float16."""
    compile: bool = False
    """Compile every tower with torch.compile(fullgraph=True); compiling is not timed."""
    rounds: int = 7
    """Timed calls of every tower; three more are made first and thrown away."""
    threads: int | None = None
    """CPU threads; without it torch's default."""
    device: str = "cpu"
    """Where to compute: cpu or cuda."""
    seed: int = 0
    """Seed of pictures, scores and random weights."""
    out: Path = Path("out/torch-bench")
    """Folder of torch_bench.json."""


def check(config: TorchBenchConfig) -> None:
    """Check all that needs no model. Raises: UserError."""
    if config.precision not in TYPES:
        raise UserError(f"--precision {config.precision}: unknown; choose one of {', '.join(TYPES)}")
    for name in config.variants:
        if name not in VARIANTS:
            raise UserError(f"--variants {name}: unknown; choose one of {', '.join(VARIANTS)}")
    if not config.batch or min(config.batch) < 1 or config.rounds < 1:
        raise UserError("--batch and --rounds: must be 1 or more")
    if config.device.partition(":")[0] not in _PEAK:
        raise UserError(f"--device {config.device}: must be cpu or cuda")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {config.device}: PyTorch sees no GPU here; use --device cpu")


def waiter(device: str) -> Call:
    """What makes the clock wait until the device has computed everything."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def interleaved(calls: list[Call], rounds: int, wait: Call, warm_up: int = 3) -> np.ndarray:
    """Milliseconds (calls, rounds); every call once per round, in turn, after `warm_up` rounds that do not count."""
    elapsed = np.zeros((len(calls), warm_up + rounds))
    for number in tqdm(range(warm_up + rounds), desc="rounds", unit="round", disable=None):
        for row, call in enumerate(calls):
            wait()
            start = time.perf_counter()
            call()
            wait()
            elapsed[row, number] = 1000 * (time.perf_counter() - start)
    return elapsed[:, warm_up:]


def peak_macs(device: str, dtype: torch.dtype) -> float:
    """MACs per second of one large square product, the median of nine."""
    size, wait = _PEAK[device.partition(":")[0]], waiter(device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    (ms,) = interleaved([lambda: a @ b], 9, wait)
    return 1000 * size**3 / statistics.median(ms)


def tower_call(module: torch.nn.Module, image_B3HW: Tensor, compiled: bool) -> Call:
    """One forward pass without gradients."""
    run = torch.compile(module, fullgraph=True) if compiled else module

    def call() -> None:
        with torch.inference_mode():
            run(image_B3HW)

    return call


def bench(config: TorchBenchConfig, tower: VisionTower | None = None) -> dict[str, Any]:
    """Measure; returns what torch_bench.json holds."""
    check(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    shared = {name: getattr(config, name) for name in ("model", "pretrained", "keep", "layer", "variants", "seed")}
    graphs, dtype = BenchConfig(**shared), TYPES[config.precision]
    tower = (load_tower(graphs) if tower is None else tower).to(config.device, dtype).eval()
    peak, rows = peak_macs(config.device, dtype), []
    for batch in config.batch:
        generator = torch.Generator().manual_seed(config.seed)
        image_B3HW = torch.randn(batch, 3, *tower.config.image_size, generator=generator).to(config.device, dtype)
        found = [_entry(tower, config, *spec) for spec in specs_of(graphs, tower.config)]
        calls = [tower_call(_pruned(tower, entry.spec, config), image_B3HW, config.compile) for entry in found]
        ms = interleaved(calls, config.rounds, waiter(config.device))
        for entry, times in zip(found, ms):
            row = row_of(config.model, entry, "torch", batch, times, ms[0])
            rate = row["images_per_s"] * entry.macs
            rows.append(row | {"runtime": _runtime(config), "macs_per_s": rate, "share_of_peak": rate / peak})
    setting = {"device": config.device, "compile": config.compile, "peak_macs_per_s": peak, "rounds": config.rounds}
    origin = {"command": command("export.torch_bench"), "versions": versions(), "machine": machine()}
    return origin | {"threads": torch.get_num_threads()} | setting | {"rows": rows}


def _runtime(config: TorchBenchConfig) -> str:
    return f"torch{'-compile' if config.compile else ''}-{config.device.partition(':')[0]}"


def _entry(tower: VisionTower, config: TorchBenchConfig, variant: str, keep: float, spec) -> Entry:
    macs, dense = macs_of(tower.config, spec), dense_macs(tower.config)
    return Entry(variant, config.precision, spec, keep, macs, dense, config.out)


def _pruned(tower: VisionTower, spec, config: TorchBenchConfig) -> PrunedTower:
    """The dense tower goes through the same walk, with no cut."""
    return PrunedTower(tower, spec, scorer_of(tower.config, spec, config.seed)).eval()


def table(result: dict[str, Any]) -> str:
    """The rows for people."""
    lines = ["{:10} {:>5} {:>10} {:>10} {:>9} {:>6} {:>7}".format(*_HEAD)]
    for row in result["rows"]:
        lines.append(
            f"{row['variant']:10} {row['batch']:5} {row['ms_p50']:10.2f} {row['images_per_s']:10.1f} "
            f"{row['speedup']:9.3f} {row['ideal_speedup']:6.3f} {100 * row['share_of_peak']:6.1f}%"
        )
    return "\n".join(lines)


_HEAD = ("variant", "batch", "ms p50", "images/s", "speed-up", "ideal", "peak")


def main(config: TorchBenchConfig) -> None:
    """Measure, write torch_bench.json, print the table."""
    result = bench(config)
    write_json(config.out / "torch_bench.json", result)
    print(table(result))


if __name__ == "__main__":
    cli.run(main, TorchBenchConfig, prog="python -m export.torch_bench")
