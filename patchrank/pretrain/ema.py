"""An exponential moving average of any module, and the schedule of its momentum."""

import copy
import math

import torch
from torch import Tensor, nn


def momentum_at(step: int, num_steps: int, base: float = 0.996, final: float = 1.0) -> float:
    """Momentum after optimiser step `step` (0 .. num_steps-1): half a cosine from `base` to `final`, no warm-up.

    `step` counts steps of the optimiser, never micro-batches, so the schedule ends at `final` under any accumulation.
    Source: BYOL (Grill et al. 2020, section 3.2); A-CLIP's base. Deviation from A-CLIP's released code: there the
    average moves every micro-step on a schedule of optimiser steps, and never comes near 1.
    """
    share = step / max(1, num_steps - 1)
    return final - (final - base) * (math.cos(math.pi * share) + 1) / 2


class Ema(nn.Module):
    """A frozen copy that follows a module: every parameter, kept and averaged in float32.

    Buffers: "own" leaves the copy's (batch norm statistics of the copy's own batches), "copy" takes the module's.
    """

    def __init__(self, online: nn.Module, *, buffers: str = "own") -> None:
        super().__init__()
        if buffers not in ("own", "copy"):
            raise ValueError(f"buffers={buffers!r}: must be 'own' or 'copy'")
        self.model = copy.deepcopy(online).float().requires_grad_(False)
        self.buffers_policy = buffers

    @torch.no_grad()
    def update(self, online: nn.Module, momentum: float) -> None:
        """theta <- momentum theta + (1 - momentum) online; to be called once after each step of the optimiser."""
        own, theirs = list(self.model.parameters()), list(online.parameters())
        torch._foreach_mul_(own, momentum)
        torch._foreach_add_(own, [parameter.detach().float() for parameter in theirs], alpha=1 - momentum)
        if self.buffers_policy == "copy":
            for mine, other in zip(self.model.buffers(), online.buffers()):
                mine.copy_(other)

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(*inputs)
