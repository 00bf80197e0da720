"""`python -m eval kernels`: speed of the affine maps of a tower, by PyTorch's default and by `patchrank.linear`."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from patchrank.atomic import write_json
from patchrank.errors import UserError
from patchrank.linear import linear
from patchrank.provenance import command, machine, versions


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Speed of the tower's affine maps: PyTorch's default kernel beside the one that patchrank uses."""

    width: int = 192
    """Channels of the tower: 192 is ViT-Ti, 768 is ViT-B."""
    rows: int = 16 * 197
    """Tokens of one call: images times tokens of an image."""
    rounds: int = 15
    """Timed rounds; both kernels take turns within a round, the first three rounds are discarded."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("out/kernels")
    """Folder of cpu_kernels.json."""


def main(config: KernelsConfig) -> None:
    """Time both kernels on the four maps of a block and write the table."""
    for name in ("width", "rows", "rounds", "threads"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be 1 or more")
    torch.set_num_threads(config.threads)
    width = config.width
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "fc1": (width, 4 * width), "fc2": (4 * width, width)}
    rows = [measure(name, *shape, config) for name, shape in tqdm(shapes.items(), desc="kernels", unit="map")]
    origin = {"command": command("eval"), "versions": versions(), "machine": machine(), "threads": config.threads}
    write_json(config.out / "cpu_kernels.json", origin | {"rows_of_a_call": config.rows, "rows": rows})
    for row in rows:
        print(f"{row['map']:4} {row['default_gmac_per_s']:6.0f} -> {row['ours_gmac_per_s']:6.0f} GMAC/s", end="  ")
        print(f"x{row['speed_up']:.2f}, largest difference {row['largest_difference']:.1e}")


@torch.inference_mode()
def measure(name: str, num_in: int, num_out: int, config: KernelsConfig) -> dict:
    """Median seconds of both kernels on one map (rows, num_in) -> (rows, num_out), as GMAC/s."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(config.rows, num_in, generator=generator)
    weight, bias = torch.randn(num_out, num_in, generator=generator), torch.zeros(num_out)
    default, ours = (lambda: F.linear(x, weight, bias)), (lambda: linear(x, weight, bias))
    pairs = [(_seconds(default), _seconds(ours)) for _ in range(config.rounds + 3)][3:]
    slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
    macs = config.rows * num_in * num_out
    return {
        "map": name,
        "default_gmac_per_s": macs / slow / 1e9,
        "ours_gmac_per_s": macs / fast / 1e9,
        "speed_up": slow / fast,
        "largest_difference": float((default() - ours()).abs().max()),
    }


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
