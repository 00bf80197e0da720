"""Edges of a picture, pooled to its patches. Letters: B pictures, C, H, W of a picture, N patches."""

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)
"""Brightness of R, G, B. Source: ITU-R BT.601."""


def edge_map(image_BCHW: Tensor, patch_size: int, pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Tensor:
    """How much edge each patch holds: (B, N) float32 in [0, 1], 0 everywhere for a picture without edges.

    Mean Sobel magnitude of the brightness over the patch, min-max over the picture. `pixel_std` undoes what the
    channels were divided by (what was subtracted has no edges); borders are repeated, so they are no edges.
    Unchanged by a picture's brightness and contrast, a x + b with a > 0.
    Source: PGS (abstract: Sobel on the whole picture protects the main object). Deviation: its released code takes
    the means of patches after each was standardised, which is rounding noise, pads with zeros, and reverses the sign.
    """
    image_BCHW = image_BCHW.float()
    weight_1311 = image_BCHW.new_tensor([luma * std for luma, std in zip(_LUMA, pixel_std)]).view(1, 3, 1, 1)
    brightness_B1HW = F.pad((image_BCHW * weight_1311).sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    # sum of two differences each: smooth along the edge first, then subtract neighbours of the same column or row
    down_B1HW = _smooth(brightness_B1HW, 3)
    across_B1HW = _smooth(brightness_B1HW, 2)
    vertical_B1HW = down_B1HW[:, :, 2:] - down_B1HW[:, :, :-2]
    horizontal_B1HW = across_B1HW[:, :, :, 2:] - across_B1HW[:, :, :, :-2]
    edge_BN = F.avg_pool2d(torch.hypot(vertical_B1HW, horizontal_B1HW), patch_size).flatten(1)
    low_B1, high_B1 = edge_BN.amin(1, keepdim=True), edge_BN.amax(1, keepdim=True)
    spread_B1 = high_B1 - low_B1
    flat_B1 = spread_B1 <= 1e-5 * brightness_B1HW.abs().amax((1, 2, 3)).unsqueeze(1).clamp_min(1e-12)
    return torch.where(flat_B1, 0.0, (edge_BN - low_B1) / spread_B1.clamp_min(1e-30))


def _smooth(x_B1HW: Tensor, axis: int) -> Tensor:
    """1-2-1 along an axis, two shorter."""
    size = x_B1HW.shape[axis]
    return x_B1HW.narrow(axis, 0, size - 2) + 2 * x_B1HW.narrow(axis, 1, size - 2) + x_B1HW.narrow(axis, 2, size - 2)
