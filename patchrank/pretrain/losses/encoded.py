"""What one step's passes made of a batch: the one input of every objective.

Letters: V views, B pictures, C, H, W of a view, D feature, T width before the projection, M captions of a picture,
L text tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchrank.pretrain.teacher import TeacherView
from patchrank.text import TextTower
from patchrank.tower import VisionTower


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A batch behind the towers; an objective takes what it `needs`."""

    feature_VBD: Tensor
    """Online image features of every view, projected, not normalised."""
    text_BD: Tensor
    """Online text features of the caption drawn for each picture, not normalised."""
    scale: Tensor
    """The logit scale itself (not its logarithm), scalar."""
    pooled_VBT: Tensor | None = None
    """The image features before the projection: input of the heads ("pooled")."""
    caption_BM: Tensor | None = None
    """int64 ids of all captions that are true for a picture, filled up with -1; None: only the drawn one is."""
    drawn_B: Tensor | None = None
    """int64 id of the caption drawn for each picture (`caption_ids`)."""
    teacher: TeacherView | None = None
    """What the EMA teacher saw of the same pictures ("teacher"; "teacher patches": with `patch_BNC`)."""
    teacher_heads: nn.ModuleDict | None = None
    """The teacher's copies of each objective's `followed` module, by objective name ("teacher")."""
    tower: VisionTower | None = None
    """The online image tower, for objectives that make a pass of their own ("tower")."""
    image_BCHW: Tensor | None = None
    """The view for such a pass, the one that the teacher saw as well ("tower")."""
    text_tower: TextTower | None = None
    """The online text tower ("text tower")."""
    token_BL: Tensor | None = None
    """int64 tokens of the drawn captions ("text tower")."""
    generator: torch.Generator | None = None
    """Chance of objectives that draw ("tower", "text tower")."""
