"""32 pictures with a caption each, as files, and the smallest towers that tell them apart."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from patchrank.pretrain.config import PretrainConfig

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
KINDS = ["red", "green", "blue", "grey"]


def write_pairs(folder: Path) -> Path:
    """Stripes in 8 directions and 4 widths, so that every patch tells; captions.json beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    y, x = np.mgrid[:40, :40]
    for number in range(32):
        angle, period = np.pi * (number % 8) / 8, (4.0, 6.5, 11.0, 20.0)[number // 8]
        wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)
        Image.fromarray(np.uint8(127 + 100 * wave)).convert("RGB").save(folder / f"{number:02d}.png")
        rows[f"{number:02d}.png"] = {"split": "train", "captions": [f"{NUMBERS[number % 8]} {KINDS[number // 8]}"]}
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder


def tiny(folder: Path, out: Path, **changes) -> PretrainConfig:
    """A run on `write_pairs` with towers of two blocks and one; crops of nine tenths of a picture."""
    config = dict(
        data="captions", data_root=folder, out=out, image_size=32, patch_size=8, width=32, num_layers=2, num_heads=2,
        feature_dim=32, text_width=32, text_layers=1, context=16, batch_size=32, num_steps=200, num_warmup=5, lr=3e-3,
        decay=0.5, weight_decay=0.0, tuning=0.3, head_width=64, head_out=32, least_area=0.9, threads=1,
        eval_every=1000, save_every=1000,
    )  # fmt: skip
    return PretrainConfig(**(config | changes))
