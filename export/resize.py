"""Resize and centre crop inside the graph, as Pillow does it: two products with fixed matrices, rounded to bytes.

Pillow resamples along one axis, stores bytes, then along the other; both passes are linear, so for one size of picture
each is a matrix. Which axis goes first depends on the sizes and on Pillow's version, so Pillow itself is asked, with
noise. Cropping takes rows of these matrices and costs nothing.

Letters: B batch, S source pixels, T target pixels, H rows, W columns.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.preprocess import Preprocess


def _bicubic(x: float) -> float:
    """Cubic convolution with a = -0.5. Source: Keys 1981, equation 15, the kernel that Pillow uses."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 if x < 2.0 else 0.0


_REACH = 2.0


def resize_matrix(source: int, target: int) -> Tensor:
    """Weights (T, S) float64 of one pass of Pillow's bicubic resampling; every row sums to 1.

    Shrinking widens the kernel, so that no pixel is skipped.
    """
    scale = source / target
    stretch = max(1.0, scale)
    matrix_TS = torch.zeros(target, source, dtype=torch.float64)
    for row in range(target):
        centre = (row + 0.5) * scale
        first = max(0, math.floor(centre - _REACH * stretch + 0.5))
        last = min(source, math.floor(centre + _REACH * stretch + 0.5))
        weights = [_bicubic((column - centre + 0.5) / stretch) for column in range(first, last)]
        matrix_TS[row, first:last] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return matrix_TS


class Resize(nn.Module):
    """uint8 (B, H, W, 3) of one fixed size -> float32 (B, 3, H', W') in 0 .. 255, whole numbers, at the model's size.

    Bicubic only: bilinear weights are fractions whose sums often end on half a byte, where Pillow's integer arithmetic
    decides in its own way.
    Raises: UserError for another interpolation, or pictures without rows or columns.
    """

    def __init__(self, preprocess: Preprocess, source: tuple[int, int]) -> None:
        super().__init__()
        if min(source) < 1:
            raise UserError(f"--source {source[0]} {source[1]}: rows and columns must be 1 or more")
        if preprocess.interpolation != "bicubic":
            raise UserError(f"--source: this model resizes by {preprocess.interpolation}; only bicubic is exact here")
        height, width = resized(preprocess, source)
        rows_HS, columns_WS = resize_matrix(source[0], height).float(), resize_matrix(source[1], width).float()
        self.columns_first = _columns_first(rows_HS, columns_WS)
        top, left = round((height - preprocess.image_size[0]) / 2), round((width - preprocess.image_size[1]) / 2)
        self.register_buffer("rows_HS", rows_HS[top : top + preprocess.image_size[0]])
        self.register_buffer("columns_SW", columns_WS[left : left + preprocess.image_size[1]].T.contiguous())

    def forward(self, image_BHW3: Tensor) -> Tensor:
        x_B3SS = image_BHW3.float().permute(0, 3, 1, 2)
        return _both(x_B3SS, self.rows_HS, self.columns_SW, self.columns_first)


def _both(x_B3SS: Tensor, rows_HS: Tensor, columns_SW: Tensor, columns_first: bool) -> Tensor:
    """Both passes, each rounded to bytes."""
    if columns_first:
        return _bytes(_bytes(rows_HS @ x_B3SS) @ columns_SW)
    return _bytes(rows_HS @ _bytes(x_B3SS @ columns_SW))


def _bytes(x: Tensor) -> Tensor:
    """Rounded to whole numbers, halves up, within 0 .. 255. Casting cuts off what is behind the point."""
    return (x + 0.5).clamp(0.0, 255.0).to(torch.int32).float()


def _columns_first(rows_HS: Tensor, columns_WS: Tensor) -> bool:
    """Whether this Pillow, for these sizes, resamples along columns (height) before it does along rows."""
    shape = rows_HS.shape[1], columns_WS.shape[1], 3
    noise = np.random.default_rng(0).choice(np.array([0, 255], dtype=np.uint8), shape)
    pillow = np.array(Image.fromarray(noise).resize((len(columns_WS), len(rows_HS)), Image.Resampling.BICUBIC))
    x_B3SS = torch.from_numpy(noise).permute(2, 0, 1)[None].float()
    expected = torch.from_numpy(pillow).permute(2, 0, 1)[None].float()
    differs = [(_both(x_B3SS, rows_HS, columns_WS.T, order) != expected).float().mean() for order in (False, True)]
    return bool(differs[1] < differs[0])


def resized(preprocess: Preprocess, source: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns after the resize of a picture of `source` rows and columns, before the crop."""
    width, height = preprocess._resized(Image.new("RGB", (source[1], source[0]))).size
    return height, width
