"""Where views lie in their picture, as data: crops for the student, one box around them for the teacher.

A box is (top, left, height, width) in pixels of the source picture, integers held in int64. No view is flipped unless
a recipe without a teacher asks for it, as a flip would part the score map from the view.

Letters: B pictures, V views, A attempts, h x w cells of a map.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_ATTEMPTS = 10


def draw_boxes(
    size_B2: Tensor,
    num_views: int,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Random resized crops: boxes (B, V, 4) int64, each inside its picture.

    Args: size (B, 2) int64 of pictures (rows, columns) >= 1; scale: area share; ratio: width over height, log-uniform;
    generator on the CPU, one row of draws a picture. The first of ten attempts that fits is taken, else the largest
    centred box whose ratio lies in the range. Source: Inception crops (Szegedy et al. 2015) as in torchvision's
    RandomResizedCrop; A-CLIP draws views at scale 0.5-1.
    """
    B = len(size_B2)
    draw_BVA4 = torch.rand(B, num_views, _ATTEMPTS, 4, generator=generator)
    full_BV2 = size_B2[:, None].expand(B, num_views, 2)
    area_BVA = size_B2.prod(-1).view(B, 1, 1) * (scale[0] + (scale[1] - scale[0]) * draw_BVA4[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect_BVA = (low + (high - low) * draw_BVA4[..., 1]).exp()
    height_BVA = (area_BVA / aspect_BVA).sqrt().round().long()
    width_BVA = (area_BVA * aspect_BVA).sqrt().round().long()
    fits_BVA = (height_BVA >= 1) & (width_BVA >= 1)
    fits_BVA &= (height_BVA <= full_BV2[..., :1]) & (width_BVA <= full_BV2[..., 1:])
    first_BV1 = fits_BVA.int().argmax(-1, keepdim=True)
    drawn_BV2 = torch.stack([height_BVA.gather(2, first_BV1), width_BVA.gather(2, first_BV1)], dim=-1).squeeze(2)
    side_BV2 = torch.where(fits_BVA.any(-1, keepdim=True), drawn_BV2, _largest(full_BV2, ratio))
    place_BV2 = draw_BVA4.gather(2, first_BV1[..., None].expand(-1, -1, -1, 4)).squeeze(2)[..., 2:]
    room_BV2 = full_BV2 - side_BV2
    place_BV2 = torch.where(fits_BVA.any(-1, keepdim=True), place_BV2, 0.5)
    corner_BV2 = (place_BV2 * (room_BV2 + 1)).long().minimum(room_BV2)
    return torch.cat([corner_BV2, side_BV2], dim=-1)


def _largest(full_BV2: Tensor, ratio: tuple[float, float]) -> Tensor:
    """Largest sides (B, V, 2) whose width over height lies in the range (at least one pixel)."""
    height, width = full_BV2.float().unbind(-1)
    most = torch.stack([torch.minimum(height, width / ratio[0]), torch.minimum(width, height * ratio[1])], dim=-1)
    return most.round().long().clamp_min(1).minimum(full_BV2)


def draw_enclosing(box_BV4: Tensor, size_B2: Tensor, generator: torch.Generator) -> Tensor:
    """A random box (B, 4) int64 of each picture that contains all of its views' boxes (B, V, 4).

    Every edge is drawn on its own: top and left between the picture's edge and the first view, bottom and right
    between the last view and the picture's edge. Source: A-CLIP's EMA view. Deviation: its released code mixes up two
    coordinates and draws sizes before it moves the corner, so that 70 % of its boxes miss a part of a view.
    """
    first_B2 = box_BV4[..., :2].amin(1)
    last_B2 = (box_BV4[..., :2] + box_BV4[..., 2:]).amax(1)
    draw_B4 = torch.rand(len(box_BV4), 4, generator=generator)
    start_B2 = (draw_B4[:, :2] * (first_B2 + 1)).long().minimum(first_B2)
    room_B2 = size_B2 - last_B2
    stop_B2 = last_B2 + (draw_B4[:, 2:] * (room_B2 + 1)).long().minimum(room_B2)
    return torch.cat([start_B2, stop_B2 - start_B2], dim=-1)


def encloses(outer_B4: Tensor, box_BV4: Tensor) -> Tensor:
    """Whether a box of each picture (B, 4) contains all boxes of its views (B, V, 4): (B,) bool."""
    outer_B14, box_end_BV2 = outer_B4[:, None], box_BV4[..., :2] + box_BV4[..., 2:]
    starts_BV2 = box_BV4[..., :2] >= outer_B14[..., :2]
    stops_BV2 = box_end_BV2 <= outer_B14[..., :2] + outer_B14[..., 2:]
    return (starts_BV2 & stops_BV2).all(-1).all(-1)


def map_scores(score_BN: Tensor, grid: tuple[int, int], from_B4: Tensor, to_B4: Tensor, out_grid) -> Tensor:
    """Scores of a map over one box, read bilinearly at the cell centres of another box: (B, h * w) float32.

    Args: score (B, N) on `grid` (rows, columns) cells of the boxes `from_B4` (B, 4); `out_grid` (h, w) cells of the
    boxes `to_B4` (B, 4), in the same pixels. One `grid_sample` for the whole batch; outside the outer cell centres the
    border's score goes on. Source: A-CLIP's resize, crop, resize a picture at a time, in its closed form.
    """
    rows, columns = out_grid
    start_B2, side_B2 = from_B4[:, :2].float(), from_B4[:, 2:].float()
    to_start_B2, to_side_B2 = to_B4[:, :2].float(), to_B4[:, 2:].float()

    def places(num: int, axis: int) -> Tensor:
        """Cell centres (B, num) in [-1, 1] of the box that is read from."""
        centre = (torch.arange(num, device=score_BN.device) + 0.5) / num
        pixel_BX = to_start_B2[:, axis : axis + 1] + centre * to_side_B2[:, axis : axis + 1]
        return 2 * (pixel_BX - start_B2[:, axis : axis + 1]) / side_B2[:, axis : axis + 1] - 1

    y_Bhw = places(rows, 0)[:, :, None].expand(-1, -1, columns)
    x_Bhw = places(columns, 1)[:, None, :].expand(-1, rows, -1)
    field_B1RC = score_BN.float().reshape(-1, 1, *grid)
    mapped_B1hw = F.grid_sample(
        field_B1RC, torch.stack([x_Bhw, y_Bhw], dim=-1), mode="bilinear", padding_mode="border", align_corners=False
    )
    return mapped_B1hw.flatten(1)
