"""From pictures to the views of a recipe: whole or cropped, their colours changed, and what the teacher sees.

All chance is drawn for a step's whole batch and read by row. Letters: V views, B pictures of a part, H, W pixels, S the
size of the whole batch.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from patchrank.preprocess import Preprocess
from patchrank.pretrain.boxes import draw_boxes, draw_enclosing
from patchrank.pretrain.colour import COLOURS, NUM_DRAWS, change
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.draws import generator
from patchrank.pretrain.originals import crop
from patchrank.pretrain.pictures import normalise, shift, to_bytes


class ViewMaker:
    """Views of pictures by row of the batch and step.

    Args: each: `map`, or a pool's, for work on single pictures.
    """

    def __init__(self, config: PretrainConfig, preprocess: Preprocess, each: Callable = map) -> None:
        self.config, self.preprocess, self._map = config, preprocess, each
        self.recipe = config.row
        self.areas = [(config.least_area, 1.0) if view.area is None else view.area for view in self.recipe.views]

    @property
    def all_whole(self) -> bool:
        """Whether all views show the whole picture, as a locked tower's do."""
        return self.recipe.locked or all(least >= 1.0 for least, _ in self.areas)

    def whole(self, pictures: Sequence[Image.Image | Tensor], rows: Sequence[int], step: int) -> dict:
        """All views are the same whole pictures, moved a little; fields of `Batch`."""
        config = self.config
        as_bytes = [one if isinstance(one, Tensor) else to_bytes(one, self.preprocess) for one in pictures]
        if config.shift:
            chance = generator(config.seed, "shift", step)
            place_S2 = torch.randint(2 * config.shift + 1, (config.batch_size, 2), generator=chance)
            image_BCHW = shift(torch.stack(as_bytes), config.shift, place_S2[rows])
        else:
            image_BCHW = torch.stack(as_bytes)
        teacher_BCHW = None
        if self.recipe.teacher is not None:
            teacher_BCHW = self._shrunk(normalise(image_BCHW, self.preprocess))
        views = [self._coloured(image_BCHW, view, rows, step) for view in range(len(self.areas))]
        return dict(view_VBCHW=_stack(views), teacher_BCHW=teacher_BCHW)

    def cropped(self, pictures: Sequence[Image.Image], rows: Sequence[int], step: int) -> dict:
        """Every view is a crop of its own, the teacher's around all of them; fields of `Batch`."""
        config, size_S2 = self.config, torch.ones(self.config.batch_size, 2, dtype=torch.int64)
        size_S2[rows] = torch.tensor([(one.height, one.width) for one in pictures])
        boxes, views = [], []
        for view, area in enumerate(self.areas):
            chance = generator(config.seed, f"box {view}", step)
            boxes.append(draw_boxes(size_S2, 1, chance, scale=area)[:, 0])
            image_BCHW = self._crops(pictures, boxes[-1][rows], config.image_size)
            views.append(self._coloured(image_BCHW, view, rows, step))
        found = dict(view_VBCHW=_stack(views), box_VB4=torch.stack([box_S4[rows] for box_S4 in boxes]))
        if self.recipe.teacher is None:
            return found
        if self.recipe.teacher.sees_view:
            return found | dict(teacher_BCHW=self._shrunk(views[0]), teacher_box_B4=found["box_VB4"][0])
        chance = generator(config.seed, "teacher box", step)
        box_B4 = draw_enclosing(torch.stack(boxes, dim=1), size_S2, chance)[rows]
        side = config.image_size // self.recipe.teacher.shrink
        teacher_BCHW = normalise(self._crops(pictures, box_B4, side), self.preprocess)
        return found | dict(teacher_BCHW=teacher_BCHW, teacher_box_B4=box_B4)

    def _crops(self, pictures: Sequence[Image.Image], box_B4: Tensor, side: int) -> Tensor:
        return torch.stack(list(self._map(lambda picture, box: crop(picture, box, side), pictures, box_B4.tolist())))

    def _coloured(self, image_BCHW: Tensor, view: int, rows: Sequence[int], step: int) -> Tensor:
        """Bytes of a view -> normalised, its colours changed as the recipe asks."""
        colour = COLOURS[self.recipe.views[view].colour]
        if colour is None:
            return normalise(image_BCHW, self.preprocess)
        chance = generator(self.config.seed, f"colour {view}", step)
        draw_SX = torch.rand(self.config.batch_size, NUM_DRAWS, generator=chance)
        changed = change(image_BCHW.float().div(255), colour, draw_SX[list(rows)])
        return normalise(changed.mul(255), self.preprocess)

    def _shrunk(self, image_BCHW: Tensor) -> Tensor:
        shrink = self.recipe.teacher.shrink
        return image_BCHW if shrink == 1 else F.avg_pool2d(image_BCHW, shrink)


def _stack(views: list[Tensor]) -> Tensor:
    """(V, B, 3, H, W), without a copy of a single view."""
    return views[0][None] if len(views) == 1 else torch.stack(views)
