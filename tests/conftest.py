"""Shared fixtures: a seeded tiny tower, and the folder of real assets where it is present."""

import os
from pathlib import Path

import pytest
import torch

from patchrank.tower import TowerConfig, VisionTower


@pytest.fixture
def assets() -> Path:
    """The folder named by PATCHRANK_ASSETS (real images and weights); skips where it is not set."""
    folder = os.environ.get("PATCHRANK_ASSETS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real images and weights are absent: PATCHRANK_ASSETS is not set to a folder")
    return Path(folder).resolve()


def make_tower(seed: int = 0, **changes) -> VisionTower:
    """Random tower of 4 blocks, C=32, N=16 in eval mode; weights large enough that patches matter."""
    config = dict(image_size=(32, 32), patch_size=8, width=32, num_layers=4, num_heads=4, mlp_width=64, output_dim=24)
    torch.manual_seed(seed)
    tower = VisionTower(TowerConfig(**(config | changes)))
    for parameter in tower.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return tower.eval().requires_grad_(False)


@pytest.fixture
def tower() -> VisionTower:
    return make_tower()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a saved CLIP of 16 patches and 6 blocks with random weights."""
    from tiny_clip import save_tiny_clip  # which imports `make_tower` from here

    return save_tiny_clip(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def one_thread():
    """One thread of torch, whose number decides the last bits of a sum."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))
