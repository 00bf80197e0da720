"""Resizing inside the graph against Pillow, byte by byte."""

import numpy as np
import pytest
import torch
from PIL import Image

from export.resize import Resize, resize_matrix
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess

GENERATOR = np.random.default_rng(0)


def preprocess(size: int, **changes) -> Preprocess:
    plain = dict(image_size=(size, size), resize=size, mean=(0.0,) * 3, std=(1.0,) * 3)
    return Preprocess(**(plain | changes))


def picture(height: int, width: int) -> np.ndarray:
    """Smooth shapes with hard edges and noise, so that the kernel overshoots and is clipped."""
    rows, columns = np.mgrid[:height, :width]
    wave = 127 + 120 * np.sin(rows / 7)[..., None] * np.cos(columns[..., None] / np.array([5, 9, 13]))
    wave[rows % 40 < 8] = 255
    return np.clip(wave + GENERATOR.normal(0, 12, wave.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "height, width, changes",
    [
        (60, 90, {}),
        (333, 221, {}),
        (20, 20, {}),
        (48, 48, {}),
        (75, 100, dict(resize=56)),
        (100, 61, dict(mode="squash")),
    ],
)
def test_graph_and_pillow_give_the_same_bytes(height: int, width: int, changes: dict) -> None:
    by_pillow = preprocess(48, **changes)
    image = picture(height, width)
    expected = (by_pillow(Image.fromarray(image)) * 255).round()
    found = Resize(by_pillow, (height, width))(torch.from_numpy(image)[None])[0]
    difference = (found - expected).abs()
    assert difference.max() <= 1, "a sum that ends on half a step may round either way"
    assert (difference > 0).float().mean() < 1e-3


def test_rows_of_the_matrix_sum_to_one_and_shrinking_reads_every_pixel() -> None:
    for source, target in ((100, 30), (30, 100), (7, 7)):
        matrix = resize_matrix(source, target)
        torch.testing.assert_close(matrix.sum(1), torch.ones(target, dtype=torch.float64))
        assert (matrix.abs().sum(0) > 0).all()
    torch.testing.assert_close(resize_matrix(7, 7), torch.eye(7, dtype=torch.float64))


def test_what_cannot_be_resized_is_refused() -> None:
    with pytest.raises(UserError, match="bilinear"):
        Resize(preprocess(48, interpolation="bilinear"), (60, 60))
    with pytest.raises(UserError, match="--source 0 5"):
        Resize(preprocess(48), (0, 5))
