"""A CLIP of 16 patches with random weights, saved: real commands on it take milliseconds."""

from pathlib import Path

import torch
from conftest import make_tower

from patchrank.checkpoints.saved import save_clip
from patchrank.preprocess import Preprocess
from patchrank.text import TextConfig, TextTower

HALF = (0.5, 0.5, 0.5)


def save_tiny_clip(folder: Path, seed: int = 0, num_layers: int = 6) -> Path:
    """Write the model; returns its folder."""
    torch.manual_seed(seed)
    text = TextTower(TextConfig(width=16, num_layers=1, num_heads=2, mlp_width=16, output_dim=24))
    for parameter in text.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    preprocess = Preprocess(image_size=(32, 32), resize=32, mean=HALF, std=HALF)
    save_clip(folder, make_tower(seed, num_layers=num_layers), text, preprocess, 20.0, name="tiny", dtype=torch.float32)
    return folder
