"""One run on many processes: who we are under `torchrun`, which part of a step's batch is ours, and sums over all.

Without `torchrun` there is one process and nothing here communicates. The pictures, captions and crops of a step are a
function of the seed and the step alone, so losses without chance of their own are the same on any number of processes.
Not the same: random masks and noise (each process draws its own), batch norms on CPUs (each sees its own part), and
the mean of masked-language terms (over processes that hide unequal numbers of bytes).
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from patchrank.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def part(self, num: int) -> slice:
        """Our share of `num` items, which must divide by the number of processes."""
        share = num // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


ALONE = World()
"""A run of one process."""


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that `torchrun` started (RANK, WORLD_SIZE, LOCAL_RANK): gloo on CPU, NCCL on GPUs."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if device == "cuda" and not dist.is_nccl_available():
        raise UserError("--device cuda: this PyTorch has no NCCL for several processes; use --device cpu")
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if device == "cuda":
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield world
    finally:
        dist.destroy_process_group()


def sum_over_ranks(value: float, device: str | torch.device = "cpu") -> float:
    """Sum of a number over all processes; the number itself where there is one process."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def average_(tensors: Iterable[Tensor]) -> None:
    """Put the mean over all processes into every tensor, bit for bit the same everywhere."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


def joined_rows(own_nX: Tensor) -> Tensor:
    """Every process's rows of one tensor, in the order of their ranks; numbers of rows may differ, all else not."""
    if not dist.is_initialized():
        return own_nX
    counts: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(counts, len(own_nX))
    parts = []
    for rank, count in enumerate(counts):
        part = own_nX.contiguous() if rank == dist.get_rank() else own_nX.new_empty(count, *own_nX.shape[1:])
        dist.broadcast(part, src=rank)
        parts.append(part)
    return torch.cat(parts)


def joined_list(own: list) -> list:
    """Every process's items, in the order of their ranks."""
    if not dist.is_initialized():
        return own
    parts: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own)
    return [item for part in parts for item in part]


def with_joined_norms(model: nn.Module) -> nn.Module:
    """The model with batch norms over the pictures of all processes; for GPUs."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
