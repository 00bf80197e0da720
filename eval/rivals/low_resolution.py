"""The same tower on a smaller image: fewer patches from the start, position embedding resized, no weight trained."""

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.rivals.budget import Rival
from patchrank.errors import UserError
from patchrank.macs import dense_macs
from patchrank.tower import TowerConfig, VisionTower


def grids(config: TowerConfig) -> list[tuple[int, int]]:
    """Smaller grids of patches whose sides keep the image's proportions to one patch."""
    rows, columns = config.grid
    return [
        (row, column)
        for row in range(1, rows + 1)
        for column in range(row * columns // rows, min(columns, -(-row * columns // rows) + 1) + 1)
        if column
    ]


def at_grid(config: TowerConfig, grid: tuple[int, int]) -> TowerConfig:
    """The config for an image of `grid` patches."""
    size = grid[0] * config.patch_size, grid[1] * config.patch_size
    return TowerConfig(**(vars(config) | {"image_size": size}))


def resize_position(position_NC: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Position embedding (N, C) of one grid, bicubic with antialiasing, for another; (N', C)."""
    map_1CHW = position_NC.T.reshape(1, -1, *grid)
    resized = F.interpolate(map_1CHW, to, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].flatten(1).T.contiguous()


class LowResolution(Rival):
    """The tower at another grid; takes images of the original size."""

    def __init__(self, tower: VisionTower, grid: tuple[int, int]) -> None:
        config = at_grid(tower.config, grid)
        super().__init__(tower, dense_macs(config))
        with torch.device(tower.position.device):
            self.small = VisionTower(config)
        position_NC = resize_position(tower.position, tower.config.grid, grid)
        self.small.load_state_dict(tower.state_dict() | {"position": position_NC})
        self.small.to(tower.position.dtype).requires_grad_(False).train(tower.training)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        size = self.small.config.image_size
        return self.small(F.interpolate(image_BCHW, size, mode="bicubic", antialias=True, align_corners=False))


def build(tower: VisionTower, macs: float) -> LowResolution:
    """The resolution whose MACs are nearest to the budget; grids are coarse, so it may miss it on either side.

    Raises: UserError for a share outside (0, 1].
    """
    if not 0.0 < macs <= 1.0:
        raise UserError(f"macs={macs:g}: must lie in (0, 1]; 0.7 is 70 % of the dense MACs")
    config = tower.config
    dense = dense_macs(config)
    return LowResolution(
        tower, min(grids(config), key=lambda grid: abs(dense_macs(at_grid(config, grid)) / dense - macs))
    )
