"""What a pretraining run can be told: the only home of its defaults, its help texts and the rules of its values.

The defaults are the recipe of the embedded model.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from patchrank.data import CATALOG
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess
from patchrank.pretrain.recipes import RECIPES
from patchrank.text import TextConfig
from patchrank.tower import TowerConfig

_FREE = ("out", "data_root", "name", "device", "eval_every", "save_every")
"""Flags that may change when a run is taken up again."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train an image tower and a text tower from scratch on pictures with captions."""

    recipe: str = "clip"
    """Row of RECIPES: clip or flip50."""
    data: str = "digits"
    """Data set with captions: a row of the catalog."""
    data_root: Path | None = None
    """Folder that holds the data sets; without it $PATCHRANK_ASSETS/data."""
    out: Path = Path("out/pretrain")
    """Folder of the run: its state, its log and in the end the model; the same command goes on after a kill."""
    name: str | None = None
    """Name that the saved model answers with; without it <recipe>-<data>."""
    seed: int = 0
    """Seed of weights, batches, captions, shifts and masks."""
    device: str = "cpu"
    """Where to compute: cpu or cuda."""
    threads: int = 2
    """CPU threads; another number gives slightly other weights."""
    num_steps: int = 5000
    """Steps of the whole run."""
    batch_size: int = 64
    """Pictures per step; each comes with one of its captions, drawn anew."""
    lr: float = 1e-3
    """Peak learning rate."""
    num_warmup: int = 100
    """Steps until the peak."""
    decay: float = 0.5
    """Share of the steps, the last ones, in which the learning rate falls to zero."""
    weight_decay: float = 0.05
    """Decay of the matrices; biases, norms, positions and the patch embedding have none."""
    curriculum: float = 0.7
    """Share of the steps, the first ones, in which pictures may be easier than they are; 0 switches it off."""
    cheap_start: float = 0.85
    """Share of the steps, the first ones, that see only the patches of most contrast; 0 follows the recipe at once."""
    cheap_keep: float = 0.3
    """Share of the patches seen during the cheap start."""
    shift: int = 4
    """Pictures move by up to so many pixels."""
    image_size: int = 112
    """Side of the pictures in pixels."""
    patch_size: int = 8
    """Side of a patch in pixels."""
    width: int = 96
    """Width of the image tower."""
    num_layers: int = 6
    """Blocks of the image tower."""
    num_heads: int = 3
    """Heads of the image tower."""
    feature_dim: int = 64
    """Dimension of the shared features."""
    text_width: int = 64
    """Width of the text tower; a head has 32."""
    text_layers: int = 2
    """Blocks of the text tower."""
    context: int = 64
    """Bytes of a text, start and end included."""
    eval_every: int = 500
    """Steps between zero-shot checks on the val split."""
    save_every: int = 250
    """Steps between states on disk: what a kill can cost."""
    dry_run: bool = False
    """Say what the run would cost, and stop; nothing is written."""

    def settings(self) -> dict[str, Any]:
        """What must not change within a run, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name not in (*_FREE, "dry_run")}

    def tower_config(self) -> TowerConfig:
        """The image tower: class token, ViT."""
        return TowerConfig(
            image_size=(self.image_size, self.image_size),
            patch_size=self.patch_size,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            mlp_width=4 * self.width,
            output_dim=self.feature_dim,
        )

    def text_config(self) -> TextConfig:
        """The text tower."""
        return TextConfig(
            context=self.context,
            width=self.text_width,
            num_layers=self.text_layers,
            num_heads=self.text_width // 32,
            mlp_width=4 * self.text_width,
            output_dim=self.feature_dim,
        )

    def preprocess(self) -> Preprocess:
        """Shorter side to the image size, centre crop, values to [-1, 1]."""
        return Preprocess(
            image_size=(self.image_size, self.image_size),
            resize=self.image_size,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )


def check(config: PretrainConfig) -> None:
    """Check all that needs no data. Raises: UserError."""
    for flag, table in (("recipe", RECIPES), ("data", CATALOG)):
        if getattr(config, flag) not in table:
            raise UserError(f"--{flag} {getattr(config, flag)}: unknown; choose one of {', '.join(table)}")
    for name in ("threads", "num_steps", "batch_size", "num_layers", "num_heads", "feature_dim", "text_layers",
                 "eval_every", "save_every", "patch_size", "width"):  # fmt: skip
        _at_least(config, name, 1)
    for name in ("num_warmup", "shift", "seed"):
        _at_least(config, name, 0)
    rules = (
        ("image_size", config.image_size >= config.patch_size and config.image_size % config.patch_size == 0,
         f"must be a multiple of --patch-size {config.patch_size}"),
        ("width", config.width % (4 * config.num_heads) == 0,
         f"must be a multiple of 4 x --num-heads {config.num_heads}"),
        ("text_width", config.text_width >= 32 and config.text_width % 32 == 0, "must be a multiple of 32"),
        ("num_warmup", config.num_warmup < config.num_steps, f"must be less than --num-steps {config.num_steps}"),
        ("lr", config.lr > 0, "must be positive"),
        ("decay", 0 < config.decay <= 1, "must lie in (0, 1]; 1 is the usual cosine"),
        ("curriculum", 0 <= config.curriculum < 1, "must lie in [0, 1)"),
        ("weight_decay", config.weight_decay >= 0, "must not be negative"),
        ("cheap_start", 0 <= config.cheap_start < 1, "must lie in [0, 1)"),
        ("cheap_keep", 0 < config.cheap_keep <= 1, "must lie in (0, 1]; 0.3 shows 30 % of the patches"),
    )  # fmt: skip
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: {rule}")
    if config.device not in ("cpu", "cuda"):
        raise UserError(f"--device {config.device}: unknown; choose cpu or cuda")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu")


def _at_least(config: PretrainConfig, name: str, least: int) -> None:
    if getattr(config, name) < least:
        raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be {least} or more")
