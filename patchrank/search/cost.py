"""What a search will cost before it runs: MACs of a strategy per image, and seconds on this machine.

The strategy itself runs, on a stand-in tower of width 8 that reports the real tower's shape, with features that are
made up: every variant it would compute is counted where the real one would be, so there is no second formula.

Letters: V variants, N patches, K kept, C width of the stand-in.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from patchrank.search.criteria import Target, build_damage
from patchrank.search.runner import Job
from patchrank.search.strategies import strategy_by_name
from patchrank.search.variants import Variants, prepare, variant_macs
from patchrank.tower import TowerConfig, VisionTower

_PROBE_SECONDS = 1.0


@dataclass(frozen=True)
class Cost:
    """Work of one image. 1 MAC = 2 FLOP."""

    macs: int
    """All MACs of the image tower, the prefix below the cut included."""
    variants: dict[int, int]
    """Kept patches K -> number of variants computed with so many."""
    other_macs: int
    """MACs outside the prefix and the variants (gradients)."""


@dataclass
class DryVariants(Variants):
    """Variants whose features cost nothing; they lose a little for every patch that is gone, so strategies behave."""

    rows: Counter = field(default_factory=Counter)
    row_macs: int = 0

    def _chunk(self, order_VN: Tensor, K: int) -> Tensor:
        self.rows[K] += len(order_VN)
        self.row_macs += len(order_VN) * variant_macs(self.tower, self.spec, self.num_patches, K)
        return self.dense_D - 0.01 * self.state.patches_BNC[0][order_VN[:, K:]].sum(1)


def stand_in(config: TowerConfig) -> VisionTower:
    """A random tower of width 8 with this depth, grid and pooling; its `config` still says the real sizes."""
    small = replace(config, width=8, num_heads=1, mlp_width=8, output_dim=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = VisionTower(small)
        for parameter in tower.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    tower.config = config
    return tower.eval().requires_grad_(False)


def strategy_cost(job: Job) -> Cost:
    """Count what the job's strategy asks for on one image; strategies that adapt to the image vary around it."""
    image_CHW = torch.randn(3, *job.tower.config.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        real = prepare(stand_in(job.tower.config), image_CHW, job.spec, job.chunk)
        prefix_macs = real.macs
        dry = DryVariants(**{part.name: getattr(real, part.name) for part in fields(Variants)})
        damage = build_damage("preservation", Target(dry.dense_D))
        strategy_by_name(job.strategy).run(dry, damage, job.options, torch.Generator().manual_seed(0))
    return Cost(dry.macs, dict(dry.rows), dry.macs - prefix_macs - dry.row_macs)


def _seconds(call: Callable[[], object], device: str, budget: float) -> float:
    """Median seconds of `call`, timed at most five times within `budget` seconds (at least once)."""
    taken, start = [], time.perf_counter()
    while not taken or (len(taken) < 5 and time.perf_counter() - start < budget):
        before = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - before)
    return float(np.median(taken))


def seconds_per_image(job: Job, cost: Cost) -> float:
    """Estimate from a short probe here: the prefix, and one chunk of few, of middling and of many kept patches."""
    image_CHW = torch.zeros(3, *job.tower.config.image_size, device=job.device)
    sizes = sorted(cost.variants) or [job.tower.config.num_patches]
    probed = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
    with torch.no_grad():
        variants = prepare(job.tower, image_CHW, job.spec, job.chunk)
        num_patches = variants.num_patches
        mask_KVN = [(torch.arange(num_patches) < K).repeat(job.chunk, 1).to(job.device) for K in probed]
        variants.features(mask_KVN[0])  # the first call pays for memory and kernels
        once = _seconds(lambda: prepare(job.tower, image_CHW, job.spec, job.chunk), job.device, _PROBE_SECONDS / 4)
        each = [
            _seconds(lambda mask=mask: variants.features(mask), job.device, _PROBE_SECONDS / 4) for mask in mask_KVN
        ]
    in_chunks = sum(num * float(np.interp(K, probed, each)) for K, num in cost.variants.items()) / job.chunk
    macs_of_chunk = job.chunk * variant_macs(job.tower, job.spec, num_patches, probed[-1])
    return once + in_chunks + cost.other_macs * each[-1] / macs_of_chunk


def duration(seconds: float) -> str:
    """Seconds as a reader says them: "40 s", "12 min", "3.5 h", "2.1 days"."""
    for limit, unit, name in ((90, 1, "s"), (90 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.0f} {name}" if value >= 10 or (name == "s" and value >= 1) else f"{value:.1f} {name}"
    return f"{seconds / 86400:.1f} days"


def cost_line(job: Job, num_images: int, num_left: int, world: int = 1) -> str:
    """One line: MACs per image and in all, and the time that this machine would take for what is left."""
    cost = strategy_cost(job)
    seconds = seconds_per_image(job, cost)
    left = "" if num_left == num_images else f", {num_left} left to do"
    num_threads = torch.get_num_threads()
    workers = f"{num_threads} thread{'s' * (num_threads > 1)}" + ("" if world == 1 else f" x {world} processes")
    total, time_left = cost.macs * num_left, duration(seconds * num_left / world)
    return (
        f"cost: {job.strategy} under {job.spec.rest} takes {cost.macs / 1e12:.3g} TMAC an image (1 MAC = 2 FLOP); "
        f"{num_images} images{left}: {total / 1e12:.3g} TMAC, about {time_left} on this machine "
        f"({workers}, {cost.macs / seconds / 1e9:.3g} GMAC/s)"
    )
