"""All that a masker may look at, and what it gives back.

Letters: B pictures, C, H, W of a picture, N patches, C width of the tower, D feature, K kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchrank.pretrain.teacher import TeacherView


@dataclass(frozen=True, kw_only=True)
class MaskContext:
    """One view of B pictures with what is known of it; fields that a masker `needs` must not be None."""

    image_BCHW: Tensor
    """float (B, 3, H, W): the view itself, normalised by mean and standard deviation."""
    patch_size: int
    """Pixels."""
    generator: torch.Generator
    """On the CPU or on the device of the image."""
    progress: float = 0.0
    """Share of the run that is done, in [0, 1]."""
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """What the channels were divided by, so that brightness can be told."""
    token_BNC: Tensor | None = None
    """Patch tokens that enter block 0, positions added ("tokens")."""
    teacher: TeacherView | None = None
    """What the EMA teacher saw of the same pictures ("teacher")."""
    box_B4: Tensor | None = None
    """This view's box (top, left, height, width) in the pixels that `teacher.box_B4` counts in; None: the same box."""
    text_BD: Tensor | None = None
    """The caption's feature by the EMA text tower, in the space of `teacher.patch_feature_BND` ("text")."""
    block: int = 1
    """Side of a selection unit in patches; a masker may score units instead of patches."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_BCHW.shape[2] // self.patch_size, self.image_BCHW.shape[3] // self.patch_size

    @property
    def unit_grid(self) -> tuple[int, int]:
        """Rows and columns of selection units."""
        return self.grid[0] // self.block, self.grid[1] // self.block

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @cached_property
    def noise_BN(self) -> Tensor:
        """Uniform noise (B, N) float32 in [0, 1), drawn once, a row a picture: all chance of a masker and of ties.

        On a CPU a picture's row does not depend on the number of pictures behind it.
        """
        return self.draw(torch.rand)

    def draw(self, kind: Callable[..., Tensor]) -> Tensor:
        """Fresh noise (B, N) float32 from the generator, on the image's device; `kind` torch.rand or torch.randn."""
        shape = (self.image_BCHW.shape[0], self.num_patches)
        return kind(shape, generator=self.generator, device=self.generator.device).to(self.image_BCHW.device)


Masker = Callable[[MaskContext], Tensor]
"""MaskContext -> score (B, N) float32 of patches, or (B, N / block^2) of units; higher = keep; finite; no graph.

A masker is a frozen dataclass, so that its parts are switches; `needs` names the fields of the context it reads:
a frozenset of "tokens", "teacher", "text".
"""


@dataclass(frozen=True)
class Selection:
    """The patches that a view keeps."""

    keep_BK: Tensor
    """int64, ascending in every row; without prefix tokens. Rows with padding: the real ones first, ascending."""
    valid_BK: Tensor | None = None
    """bool, False = padding (per-image ratios only); None: every entry is real."""

    def share(self, num_patches: int) -> Tensor:
        """Share of all patches that is kept, mean over pictures; scalar float32."""
        num_kept = self.keep_BK.shape[1]
        if self.valid_BK is None:
            return torch.tensor(num_kept / num_patches, device=self.keep_BK.device)
        return self.valid_BK.float().mean() * num_kept / num_patches
