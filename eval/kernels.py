"""`python -m eval kernels`: speed of a block's parts, by PyTorch's default and by ours.

Affine maps (`patchrank.linear`) in float32 as a frozen tower computes them, and attention (`patchrank.attention`) in
bfloat16 with its gradient, as pretraining does.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from patchrank.atomic import write_json
from patchrank.attention import attention
from patchrank.errors import UserError
from patchrank.linear import linear
from patchrank.provenance import command, machine, versions


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Speed of a tower's affine maps and of its attention in training: PyTorch's default kernels beside ours."""

    width: int = 192
    """Channels of the tower: 192 is ViT-Ti, 768 is ViT-B."""
    rows: int = 16 * 197
    """Tokens of one call: images times tokens of an image."""
    tokens: int = 197
    """Tokens of an image, for attention."""
    head_width: int = 64
    """Channels of a head."""
    rounds: int = 15
    """Timed rounds; both kernels take turns within a round, the first three rounds are discarded."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("out/kernels")
    """Folder of cpu_kernels.json."""


def main(config: KernelsConfig) -> None:
    """Time both kernels on the four maps of a block and on its attention, and write the table."""
    for name in ("width", "rows", "tokens", "head_width", "rounds", "threads"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be 1 or more")
    if config.width % config.head_width or config.rows % config.tokens:
        raise UserError(
            f"--width {config.width} --rows {config.rows}: must be multiples of --head-width {config.head_width} and "
            f"--tokens {config.tokens}"
        )
    torch.set_num_threads(config.threads)
    width = config.width
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "fc1": (width, 4 * width), "fc2": (4 * width, width)}
    rows = [measure(name, *shape, config) for name, shape in tqdm(shapes.items(), desc="kernels", unit="map")]
    rows.append(measure_attention(config))
    origin = {"command": command("eval"), "versions": versions(), "machine": machine(), "threads": config.threads}
    write_json(config.out / "cpu_kernels.json", origin | {"rows_of_a_call": config.rows, "rows": rows})
    for row in rows:
        print(f"{row['map']:9} {row['default_gmac_per_s']:6.0f} -> {row['ours_gmac_per_s']:6.0f} GMAC/s", end="  ")
        print(f"x{row['speed_up']:.2f}, largest difference {row['largest_difference']:.1e}")


@torch.inference_mode()
def measure(name: str, num_in: int, num_out: int, config: KernelsConfig) -> dict:
    """Median seconds of both kernels on one map (rows, num_in) -> (rows, num_out), as GMAC/s."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(config.rows, num_in, generator=generator)
    weight, bias = torch.randn(num_out, num_in, generator=generator), torch.zeros(num_out)
    default, ours = (lambda: F.linear(x, weight, bias)), (lambda: linear(x, weight, bias))
    return _compare(name, default, ours, config.rows * num_in * num_out, config.rounds)


def measure_attention(config: KernelsConfig) -> dict:
    """The same of attention and its gradient in bfloat16; largest difference of what flows back to queries."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.rows // config.tokens, config.width // config.head_width, config.tokens, config.head_width)
    q, k, v = (torch.randn(shape, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    direction = torch.randn(shape, generator=generator).bfloat16()

    def gradient(kernel: Callable[..., Tensor]) -> Tensor:
        return torch.autograd.grad(kernel(q, k, v), (q, k, v), direction)[0]

    macs = 3 * 2 * config.rows * config.tokens * config.width
    default, ours = (lambda: gradient(F.scaled_dot_product_attention)), (lambda: gradient(attention))
    return _compare("attention", default, ours, macs, config.rounds)


def _compare(name: str, default: Callable[[], Tensor], ours: Callable[[], Tensor], macs: int, rounds: int) -> dict:
    pairs = [(_seconds(default), _seconds(ours)) for _ in range(rounds + 3)][3:]
    slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
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
