"""`python -m eval throughput`: images per second of the methods in PyTorch and in every exported runtime.

Each call stands right behind one of the dense tower in the same runtime, so that a busy machine slows both alike; the
speed-up beside the ideal one from MACs says how much of the saving arrives.
"""

from dataclasses import dataclass
from pathlib import Path

from eval.measuring import MeasureConfig, Unreached, open_bench
from eval.records import DENSE
from eval.rivals import OURS
from eval.suite_config import RUNTIMES, SuiteConfig
from eval.suite_speed import read_rows, speed_path, write_speed
from eval.tables import as_text
from patchrank.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Images per second of methods in PyTorch and ONNX Runtime, each call beside one of the dense tower."""

    model: str = "embedded"
    """Open_clip name, timm name, folder, file, or "embedded": the small model in the package."""
    pretrained: str = ""
    """Open_clip tag or checkpoint file of --model."""
    methods: tuple[str, ...] = (DENSE, OURS, "tome")
    """Methods to time: rows of the rivals' table; dense is always there."""
    macs: tuple[float, ...] = ()
    """Budgets: shares of the dense image tower's MACs. Without --macs and --keep: 0.7."""
    keep: tuple[float, ...] = ()
    """Budgets said as the share of patches that one dropping cut leaves at a quarter of the depth; not with --macs."""
    files: tuple[str, ...] = ()
    """Trained or searched files that some rows need, as dtem=out/dtem; rows without theirs are skipped and say so."""
    runtimes: tuple[str, ...] = RUNTIMES
    """torch, onnxruntime (the exported graphs of the methods that have one)."""
    batch: tuple[int, ...] = (16,)
    """Images per call."""
    rounds: int = 5
    """Timed calls of every row; one more is made first and thrown away."""
    threads: int | None = None
    """CPU threads; without it torch's default."""
    device: str = "cpu"
    """Where PyTorch computes: cpu or cuda."""
    seed: int = 0
    """Seed of the random pictures."""
    out: Path = Path("out/throughput")
    """Folder of the files, one for each runtime and batch; rows that they hold are not timed again."""


def main(config: ThroughputConfig) -> None:
    """Time what `--out` lacks, then print the table."""
    tables, unreached = measure(config)
    for title, rows in tables.items():
        print(f"{title}\n{as_text(_HEAD, [_cells(row) for row in rows])}")
        for row in rows:
            if row["speedup"] <= 1.0:
                print(f"  {row['method']} at {100 * row['macs']:.3g} % does not pay here: it is not faster than dense")
    for one in unreached:
        print(f"no row for {one.method} at {100 * one.macs:.3g} %: {one.reason}")
    print(f"speed-up: median over {config.rounds} pairs [quartiles]; ideal: from MACs. Files in {config.out}")


def check(config: ThroughputConfig) -> None:
    """Raises: UserError for values that need no model to be seen wrong."""
    for name in config.runtimes:
        if name not in RUNTIMES:
            raise UserError(f"--runtimes {name}: unknown; choose from {', '.join(RUNTIMES)}")
    if not config.batch or min(config.batch) < 1:
        raise UserError(f"--batch {' '.join(map(str, config.batch))}: needs sizes of 1 or more")
    if config.rounds < 1:
        raise UserError(f"--rounds {config.rounds}: must be 1 or more")


def measure(config: ThroughputConfig) -> tuple[dict[str, list[dict]], list[Unreached]]:
    """Title (runtime and batch) -> rows of the asked-for methods in their order, and what cannot be had."""
    check(config)
    shared = "model pretrained methods macs keep files threads device seed"
    tables = {}
    with open_bench(MeasureConfig(**{name: getattr(config, name) for name in shared.split()}, cache=None)) as bench:
        wanted = [(method.name, method.macs) for method in bench.methods if method.name != DENSE]
        if not wanted:
            raise UserError(f"--methods {' '.join(config.methods)}: names nothing to hold against dense; add a rival")
        for runtime in config.runtimes:
            for batch in config.batch:
                options = dict(speed_batch=batch, rounds=config.rounds, seed=config.seed, out=config.out)
                suite = SuiteConfig(device=config.device, **options)
                write_speed(suite, bench, runtime)
                rows = {(row["method"], row["macs"]): row for row in read_rows(speed_path(suite, bench, runtime))}
                tables[f"{runtime}, {batch} images a call"] = [rows[key] for key in wanted if key in rows]
        return tables, bench.unreached


_HEAD = ["method", "budget %", "MACs %", "ms p50", "images/s", "speed-up", "quartiles", "ideal"]


def _cells(row: dict) -> list[str]:
    low, high = row["speedup_quartiles"]
    return [
        row["method"],
        f"{100 * row['macs']:.3g}",
        f"{100 * row['image_macs'] / row['dense_macs']:.1f}",
        f"{row['ms_p50']:.2f}",
        f"{row['images_per_s']:.1f}",
        f"{row['speedup']:.3f}",
        f"[{low:.2f}, {high:.2f}]",
        f"{row['ideal_speedup']:.3f}",
    ]
