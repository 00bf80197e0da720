"""A shallower dense tower: fewer blocks of the same kind, distilled from the dense one; what pruning must beat.

It starts as evenly spaced blocks of the dense tower (as DistilBERT does, Sanh et al. 2019) and learns the dense
tower's features without labels; the patch embedding stays. Depths are whole blocks, so a budget is hit by chance only.
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eval.rivals.budget import Rival
from patchrank.atomic import write_tensors
from patchrank.checkpoints.weights import weights_hash
from patchrank.errors import UserError
from patchrank.macs import dense_macs
from patchrank.tower import TowerConfig, VisionTower


def depth_for(config: TowerConfig, macs: float) -> int:
    """Number of blocks whose MACs are nearest to a budget. Raises: UserError for a share outside (0, 1]."""
    if not 0.0 < macs <= 1.0:
        raise UserError(f"macs={macs:g}: must lie in (0, 1]; 0.7 is 70 % of the dense MACs")
    target = macs * dense_macs(config)
    depths = range(1, config.num_layers + 1)
    return min(depths, key=lambda depth: abs(dense_macs(replace(config, num_layers=depth)) - target))


def source_blocks(num_layers: int, depth: int) -> list[int]:
    """Evenly spaced blocks of the dense tower, the first and the last among them (of one, the first)."""
    if depth == 1:
        return [0]
    return [round(place * (num_layers - 1) / (depth - 1)) for place in range(depth)]


def student(tower: VisionTower, depth: int) -> VisionTower:
    """A tower of `depth` blocks that starts with copies of the dense one's; everything else is copied too."""
    with torch.device(tower.position.device):
        found = VisionTower(replace(tower.config, num_layers=depth))
    names = {
        f"blocks.{source}.": f"blocks.{place}." for place, source in enumerate(source_blocks(len(tower.blocks), depth))
    }
    weights = {}
    for name, value in tower.state_dict().items():
        prefix = ".".join(name.split(".")[:2]) + "."
        if not name.startswith("blocks."):
            weights[name] = value
        elif prefix in names:
            weights[names[prefix] + name.removeprefix(prefix)] = value
    found.load_state_dict(weights)
    return found.to(tower.position.dtype).eval().requires_grad_(False)


def file_of(folder: Path, depth: int) -> Path:
    """Where a student of a folder lies."""
    return folder / f"shallow_{depth}.safetensors"


def save(folder: Path, small: VisionTower, source_hash: str) -> None:
    """Write a distilled student; `source_hash` names the dense tower's weights."""
    path = file_of(folder, small.config.num_layers)
    write_tensors(path, small.state_dict(), {"weights_hash": source_hash})


class Shallow(Rival):
    """The student in place of the tower."""

    def __init__(self, tower: VisionTower, small: VisionTower) -> None:
        super().__init__(tower, dense_macs(small.config))
        self.small = small

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.small(image_BCHW)


def build(tower: VisionTower, macs: float, path: Path) -> Shallow:
    """The distilled student whose depth is nearest to a budget.

    Raises: UserError for a folder without a student of this depth and tower, or a share outside (0, 1].
    """
    small = student(tower, depth_for(tower.config, macs))
    file = file_of(path, small.config.num_layers)
    try:
        with safe_open(str(file), "pt") as opened:
            found = (opened.metadata() or {}).get("weights_hash")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        if found != weights_hash(tower):
            raise ValueError(f"made for weights {str(found)[:12]}")
        small.load_state_dict(tensors)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{file}: is no student of this tower ({reason}); distil one: "
            f"python -m eval.rivals.train --method shallow --macs {macs:g}"
        ) from error
    return Shallow(tower, small)
