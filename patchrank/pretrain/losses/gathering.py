"""Rows of all processes, with or without the way back for gradients. Letters: B rows here, G = B x processes, D."""

import torch
import torch.distributed as dist
from torch import Tensor


def _is_single() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


class _Gather(torch.autograd.Function):
    """Concatenate over processes; backward adds up what every process wants of my rows."""

    @staticmethod
    def forward(ctx, x_BD: Tensor) -> Tensor:
        return _stacked(x_BD)

    @staticmethod
    def backward(ctx, grad_GD: Tensor) -> Tensor:
        total_GD = grad_GD.contiguous().clone()
        dist.all_reduce(total_GD)
        return total_GD.chunk(dist.get_world_size())[dist.get_rank()]


def _stacked(x_BD: Tensor) -> Tensor:
    parts = [torch.empty_like(x_BD) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x_BD.contiguous())
    return torch.cat(parts)


def gather_rows(x_BD: Tensor, gather_grad: bool = True) -> Tensor:
    """Rows (G, ...) of all processes in rank order, as many from each; alone in the world, `x_BD` itself.

    With `gather_grad`, gradients flow back to the process that a row came from, so that the mean over processes of
    each one's loss has the gradient of a single process on the joined batch (which is what DDP's averaging needs).
    Without, all rows are constants: a process's own rows get their gradient where the loss uses them as they are
    (a loss of two directions does), or from `own_rows_in`.
    Source: `gather_grad=False` is the gather of SLIP's CLIP loss (issue 31 of its repository).
    """
    if _is_single():
        return x_BD
    if gather_grad and x_BD.requires_grad:
        return _Gather.apply(x_BD)
    return _stacked(x_BD.detach())


def own_rows_in(x_GD: Tensor, x_BD: Tensor) -> Tensor:
    """Gathered rows (G, D) with this process's own (B, D) in their place, so that these have their gradient."""
    if len(x_GD) == len(x_BD):
        return x_GD
    own_B = first_row(len(x_BD)) + torch.arange(len(x_BD), device=x_BD.device)
    return x_GD.index_copy(0, own_B, x_BD)


def first_row(num_rows: int) -> int:
    """Where this process's rows begin in `gather_rows`."""
    return 0 if _is_single() else dist.get_rank() * num_rows
