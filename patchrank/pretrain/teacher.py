"""The teacher: an exponential moving average of the towers in training, and what it says about a picture.

Letters: B pictures, S blocks of the tower, N patches of the teacher's grid, C width, D feature.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.pretrain.class_rows import run_with_class_rows
from patchrank.pretrain.ema import Ema
from patchrank.text import TextTower
from patchrank.tower import VisionTower


@dataclass(frozen=True, kw_only=True)
class TeacherView:
    """What the teacher saw; nothing here has a graph."""

    grid: tuple[int, int]
    """Rows and columns of the teacher's patches: half of the student's in each direction at half resolution."""
    attention_BSN: Tensor
    """float32: attention of the class token to each patch, mean over heads, one row a block."""
    pooled_BC: Tensor
    """The feature before the projection."""
    feature_BD: Tensor
    """The feature, not normalised."""
    patch_BNC: Tensor | None = None
    """Patch tokens after the final norm; None unless asked for."""
    patch_feature_BND: Tensor | None = None
    """`patch_BNC` in the space of `feature_BD`; None unless asked for."""
    box_B4: Tensor | None = None
    """The teacher's box (top, left, height, width) in source pixels; None: it saw what the student saw."""


def resize_position(position_NC: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position table for another grid, bilinear with antialiasing: constants and linear fields stay what they are.

    (At the border a linear field bends, as a resized grid's outer centres lie further in.)
    """
    if grid == new_grid:
        return position_NC
    field_1CHW = position_NC.T.reshape(1, -1, *grid)
    resized_1CHW = F.interpolate(field_1CHW, new_grid, mode="bilinear", antialias=True, align_corners=False)
    return resized_1CHW.flatten(2)[0].T


def embed_resized(tower: VisionTower, image_BCHW: Tensor) -> Tensor:
    """`tower.embed` for pictures of any multiple of the patch size: (B, P + N, C); positions are resized."""
    side = tower.config.patch_size
    grid = image_BCHW.shape[2] // side, image_BCHW.shape[3] // side
    patches_BNC = tower.patch(image_BCHW).flatten(2).transpose(1, 2)
    patches_BNC = patches_BNC + resize_position(tower.position, tower.config.grid, grid)
    prefix_BPC = tower.prefix.to(patches_BNC.dtype).expand(len(image_BCHW), -1, -1)
    return tower.norm_pre(torch.cat([prefix_BPC, patches_BNC], dim=1))


class Teacher(nn.Module):
    """EMA copies of the image tower, of the objectives' followed heads and, if asked for, of the text tower.

    Its whole state is in `state_dict`. The text tower is copied entirely or not at all: A-CLIP's released code mixes
    EMA blocks with online embeddings. Heads run in train mode (batch statistics of their own batches).
    """

    def __init__(
        self, tower: VisionTower, heads: Mapping[str, nn.Module] | None = None, text: TextTower | None = None
    ) -> None:
        super().__init__()
        self.tower = Ema(tower)
        self.heads = nn.ModuleDict({name: Ema(head) for name, head in (heads or {}).items()})
        self.text = None if text is None else Ema(text)

    def update(
        self,
        momentum: float,
        tower: VisionTower,
        heads: Mapping[str, nn.Module] | None = None,
        text: TextTower | None = None,
    ) -> None:
        """Move towards the online modules; once after each step of the optimiser (`ema.momentum_at`)."""
        self.tower.update(tower, momentum)
        for name, head in self.heads.items():
            head.update(heads[name], momentum)
        if self.text is not None:
            self.text.update(text, momentum)

    @torch.no_grad()
    def look(self, image_BCHW: Tensor, *, patches: bool = False, box_B4: Tensor | None = None) -> TeacherView:
        """One pass over whole pictures (B, 3, H, W), at the tower's resolution or another multiple of its patch size.

        Args: patches: also give the patch tokens and their features; box: kept for `map_scores`.
        """
        tower = self.tower.model
        config, side = tower.config, tower.config.patch_size
        x_BLC, attention_BSN = run_with_class_rows(tower, embed_resized(tower, image_BCHW), patches=patches)
        pooled_BC = tower.pooled(x_BLC)
        patch_BNC = tower.norm(x_BLC[:, config.num_prefix :]) if patches else None
        return TeacherView(
            grid=(image_BCHW.shape[2] // side, image_BCHW.shape[3] // side),
            attention_BSN=attention_BSN,
            pooled_BC=pooled_BC,
            feature_BD=tower.proj(pooled_BC),
            patch_BNC=patch_BNC,
            patch_feature_BND=tower.proj(patch_BNC) if patches else None,
            box_B4=box_B4,
        )
