"""What rivals share: a module that knows its MACs, files that some need, the setting that meets a budget."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.macs import dense_macs
from patchrank.tower import TowerConfig, VisionTower


class Rival(nn.Module, ABC):
    """image (B, 3, H, W) -> feature (B, D) of a frozen tower, and what one image costs.

    A method that leaves the first blocks as they are says so by `first_layer`, and has `forward_from`: tokens
    (B, P + N, C) that enter block `layer`, at most that one -> the feature.
    Args: tower, the dense one; macs: multiply-accumulates per image of what `forward` computes, in closed form.
    """

    trained_on: str | None = None
    """Images and steps of what was trained for it, where its file says so."""

    def __init__(self, tower: VisionTower, macs: int) -> None:
        super().__init__()
        self.tower = tower
        self.macs = macs

    @abstractmethod
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Feature (B, D) of normalised images (B, 3, H, W)."""

    @property
    def first_layer(self) -> int | None:
        """The first block whose tokens may be fewer, so that those below can be shared; None where none can be."""
        return None

    @property
    def macs_share(self) -> float:
        """MACs over those of the dense tower whose last block computes the class row only."""
        return self.macs / dense_macs(self.tower.config)


class NotGiven(UserError):
    """A row that needs a trained or searched file, and none was named: reports skip it and say so."""


def at_budget(path: Path, macs: float) -> Path:
    """The part of a folder that belongs to one budget (`path`/0.7), or the path itself where it serves all of them."""
    part = path / f"{macs:g}"
    return part if part.exists() else path


def class_token(tower: VisionTower, name: str) -> None:
    """Raise UserError for a tower without the class token that the method `name` reads."""
    if tower.config.num_prefix == 0:
        raise UserError(f"{name}: needs a class token, which this tower has not; compare with tome")


def nearest_setting(
    config: TowerConfig, macs: float, cost: Callable[[int], int], largest: int, smallest: int = 1
) -> int:
    """The setting in smallest .. largest whose cost is nearest to `macs` of the dense tower, on either side.

    Our own presets never exceed a budget; a rival may by half a step, so that no grid counts against it.
    Args: macs share in (0, 1]; cost(setting) -> MACs per image, rising (close to `largest` it may fall again, where a
    method pays for a choice that saves nothing; `largest` itself is taken where it fits).
    Raises: UserError for a share below what the smallest setting costs, naming the range.
    """
    dense = dense_macs(config)
    lowest = cost(smallest) / dense
    if not lowest <= macs <= 1.0:
        raise UserError(f"macs={macs:g}: this method reaches {lowest + 5e-4:.3f} to 1 of the dense MACs here")
    if cost(largest) <= macs * dense:
        return largest
    low, high = smallest, largest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= macs * dense else (low, middle - 1)
    return min((low, min(low + 1, largest)), key=lambda setting: abs(cost(setting) - macs * dense))
