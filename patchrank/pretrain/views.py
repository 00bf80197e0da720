"""Crops of pictures as a pure function of their boxes: resized with antialiasing by two batched matrix products.

Letters: B pictures, C, H, W of the sources, h, w of a view, S source pixels and T target pixels of one axis.
"""

import torch
from torch import Tensor


def resize_weights(start_B: Tensor, side_B: Tensor, num_target: int, num_source: int) -> Tensor:
    """Weights (B, T, S) float32 that resize the pixels start .. start + side - 1 of one axis to `num_target`.

    Triangle filter, widened where the view is smaller than its box (antialiasing); pixels outside the box do not
    count; rows sum to 1. Args: start and side (B) int64 or float, in source pixels.
    """
    device = start_B.device
    step_B11 = (side_B.float() / num_target)[:, None, None]
    centre_BT1 = start_B.float()[:, None, None] + (torch.arange(num_target, device=device)[:, None] + 0.5) * step_B11
    pixel_S = torch.arange(num_source, device=device).float()
    distance_BTS = (pixel_S + 0.5 - centre_BT1).abs() / step_B11.clamp_min(1.0)
    inside_B1S = (pixel_S >= start_B[:, None, None]) & (pixel_S < (start_B + side_B)[:, None, None])
    weight_BTS = (1 - distance_BTS).clamp_min(0) * inside_B1S
    return weight_BTS / weight_BTS.sum(-1, keepdim=True)


def crop(image_BCHW: Tensor, box_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """Views (B, C, h, w) float32 of `size` (h, w): the boxes (B, 4) of pictures (B, C, H, W), bilinear, antialiased.

    Equal to cropping, then resizing as `torch.nn.functional.interpolate(mode="bilinear", antialias=True)`.
    """
    rows_BhH = resize_weights(box_B4[:, 0], box_B4[:, 2], size[0], image_BCHW.shape[2])
    columns_BwW = resize_weights(box_B4[:, 1], box_B4[:, 3], size[1], image_BCHW.shape[3])
    return torch.einsum("bhy,bcyx,bwx->bchw", rows_BhH, image_BCHW.float(), columns_BwW)


def flip(image_BCHW: Tensor, generator: torch.Generator, chance: float = 0.5) -> Tensor:
    """Mirror each picture left to right with this chance."""
    flipped_B = torch.rand(len(image_BCHW), generator=generator).to(image_BCHW.device) < chance
    return torch.where(flipped_B[:, None, None, None], image_BCHW.flip(-1), image_BCHW)
