"""open_clip's CLIP and CustomTextCLIP (SigLIP and other timm trunks): `visual` is swapped, the rest is copied."""

import copy

from torch import Tensor, nn

from patchrank.adapters.position_tokens import check_grid, position_tokens
from patchrank.checkpoints import tower_from_open_clip
from patchrank.errors import UserError
from patchrank.macs import pruned_macs as cost
from patchrank.pruned import PrunedTower
from patchrank.tower import VisionTower

__all__ = ["PrunedVisual", "attach", "cost", "tower"]

_CLASSES = ("CLIP", "CustomTextCLIP")


class PrunedVisual(nn.Module):
    """Stands where open_clip's `visual` stood: image (B, 3, H, W) -> feature (B, D), and tokens if `output_tokens`.

    Plain attributes (image_size, preprocess_cfg, output_tokens, ...) are copied from the original.
    """

    def __init__(self, visual: nn.Module, pruned: PrunedTower) -> None:
        super().__init__()
        for name, value in vars(visual).items():
            if not name.startswith("_"):
                setattr(self, name, copy.deepcopy(value))
        self.pruned = pruned.train(visual.training)

    def forward(self, image_BCHW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        check_grid(self.pruned, image_BCHW)
        if not getattr(self, "output_tokens", False):
            return self.pruned(image_BCHW)
        tokens_BLC = position_tokens(self.pruned, image_BCHW)
        whole = self.pruned.tower
        normed_BLC = whole.norm(tokens_BLC) if whole.config.norm == "before_pool" else tokens_BLC
        return whole.head(tokens_BLC), normed_BLC[:, whole.config.num_prefix :]

    def forward_intermediates(self, *_, **__) -> None:
        """Refused: tokens between the blocks are not those of an unpruned tower."""
        raise UserError("forward_intermediates: a pruned tower has no full token maps inside; use the original model")


def tower(model: nn.Module) -> VisionTower:
    """Copy of the image tower. Raises: UserError for CoCa and for image towers that are not plain ViTs."""
    name = type(model).__name__
    if not any(cls.__name__ in _CLASSES for cls in type(model).__mro__ if cls.__module__.startswith("open_clip.")):
        raise UserError(f"{name}: this open_clip class is not supported; use one of {', '.join(_CLASSES)}")
    return tower_from_open_clip(model.visual, name=name)


def attach(model: nn.Module, pruned: PrunedTower) -> nn.Module:
    """Deep copy of `model` with `visual` replaced; the original image tower is not copied."""
    return copy.deepcopy(model, {id(model.visual): PrunedVisual(model.visual, pruned)})
