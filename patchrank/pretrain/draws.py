"""Chance without state: every random draw of a run is a function of (seed, purpose, step or epoch).

So a run that is killed and resumed draws what it would have drawn, with nothing to save but the step.
"""

import zlib

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, purpose: str, number: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Generator of one purpose ("mask", "caption", ...) at one step or epoch; other devices draw other numbers."""
    words = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), number]).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 31 ^ int(words[1]))


def sampler(num_items: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices (B,) int64 of one step's batch: epochs are permutations, a last batch that is not full is left out.

    Args: 1 <= batch_size <= num_items; step >= 0.
    """
    epoch, place = divmod(step, num_items // batch_size)
    order = torch.randperm(num_items, generator=generator(seed, "epoch", epoch))
    return order[place * batch_size : (place + 1) * batch_size]
