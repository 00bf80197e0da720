"""What the three libraries want besides the feature: a token for every position, as an unpruned tower gives.

Letters: B batch, P prefix tokens, N patches, K kept, C width.
"""

import torch
from torch import Tensor

from patchrank.errors import UserError
from patchrank.pruned import PrunedTower


def check_grid(pruned: PrunedTower, image_BCHW: Tensor) -> None:
    """Refuse images whose patches do not make the tower's grid; raises UserError."""
    config = pruned.config
    height, width = image_BCHW.shape[-2:]
    if (height // config.patch_size, width // config.patch_size) != config.grid:
        raise UserError(
            f"image of {height} x {width}: this pruned tower takes {config.image_size[0]} x {config.image_size[1]}; "
            "resize the image, or apply patchrank to a model built for that size"
        )


def position_tokens(pruned: PrunedTower, image_BCHW: Tensor) -> Tensor:
    """Tokens behind the last block, before any final norm: (B, P + N, C) under fold, (B, P + K, C) under drop.

    Under fold every patch has the token that it was folded into, so pooling over positions gives the same result as
    pooling the K tokens by size; under drop the K kept patches stand in the order of their scores.
    """
    check_grid(pruned, image_BCHW)
    state, cuts = pruned.tokens(image_BCHW)
    if pruned.spec.rest == "drop":
        return state.x_BLC
    patches_BNC = pruned.unfold(state.patches_BNC, cuts)
    return torch.cat([state.x_BLC[:, : state.num_prefix], patches_BNC], dim=1)
