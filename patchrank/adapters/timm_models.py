"""timm's VisionTransformer: the model is the tower, so the copy is of a subclass that runs the pruned one."""

import copy

from torch import Tensor, nn

from patchrank.adapters.position_tokens import check_grid, position_tokens
from patchrank.checkpoints import tower_from_timm
from patchrank.errors import UserError
from patchrank.macs import pruned_macs as cost
from patchrank.pruned import PrunedTower
from patchrank.torchvision_shim import ensure_torchvision
from patchrank.tower import VisionTower

ensure_torchvision()
from timm.models.vision_transformer import VisionTransformer  # noqa: E402 (timm imports torchvision)

__all__ = ["PrunedVisionTransformer", "attach", "cost", "tower"]


class PrunedVisionTransformer(VisionTransformer):
    """timm's model with a pruned tower inside: `forward`, `forward_features` and `forward_head` give what they gave.

    Made by `attach` from the state of an existing model, never by its constructor.
    """

    pruned: PrunedTower

    def forward(self, x: Tensor) -> Tensor:
        """image (B, 3, H, W) -> logits (B, classes)."""
        check_grid(self.pruned, x)
        return self.head(self.head_drop(self.pruned(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """image (B, 3, H, W) -> tokens (B, P + N, C) under fold, (B, P + K, C) under drop, behind the final norm."""
        return self.norm(position_tokens(self.pruned, x))

    def forward_intermediates(self, *_, **__) -> None:
        """Refused: tokens between the blocks are not those of an unpruned tower."""
        raise UserError("forward_intermediates: a pruned tower has no full token maps inside; use the original model")

    def prune_intermediate_layers(self, *_, **__) -> None:
        """Refused: the cuts belong to this depth."""
        raise UserError("prune_intermediate_layers: the tower is pruned already; call it on the original model first")

    def set_input_size(self, *_, **__) -> None:
        """Refused: the counts of the cuts belong to this grid."""
        raise UserError("set_input_size: the tower is pruned for its size; call it on the original model first")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head; another pooling is refused."""
        if global_pool not in (None, self.global_pool):
            raise UserError(f"global_pool={global_pool!r}: the tower pools by {self.global_pool!r}; reset the original")
        super().reset_classifier(num_classes)


def tower(model: nn.Module) -> VisionTower:
    """Copy of the tower without its classifier. Raises: UserError for other classes and options of timm."""
    return tower_from_timm(model, head=False, name=type(model).__name__)


def attach(model: nn.Module, pruned: PrunedTower) -> PrunedVisionTransformer:
    """Deep copy of `model` as `PrunedVisionTransformer`, with the pruned tower's blocks and norm for its own."""
    memo = {id(model.blocks): pruned.tower.blocks}
    if pruned.config.norm == "before_pool":
        memo[id(model.norm)] = pruned.tower.norm
    state = copy.deepcopy(model.__dict__, memo)
    copied = PrunedVisionTransformer.__new__(PrunedVisionTransformer)
    copied.__setstate__(state)
    copied.pruned = pruned.train(model.training)
    return copied
