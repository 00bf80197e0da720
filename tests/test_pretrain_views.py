"""Boxes of views as data, and score maps carried from box to box."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from patchrank.pretrain.boxes import draw_boxes, draw_enclosing, encloses, map_scores
from patchrank.pretrain.maskers import MaskContext, MaskSpec, mask
from patchrank.pretrain.teacher import TeacherView


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def sizes(num, seed=0):
    """(num, 2) sizes of pictures: ordinary, square, panoramic, and 1 pixel in one or both directions."""
    size_B2 = torch.randint(1, 700, (num, 2), generator=chance(seed))
    size_B2[: num // 4, 1] = size_B2[: num // 4, 0]
    size_B2[num // 4 : num // 3, 0] = 1
    size_B2[num // 3 : num // 2, 1] *= 20
    size_B2[:3] = torch.tensor([[1, 1], [1, 900], [900, 1]])
    return size_B2


def whole_boxes(size_B2):
    return torch.cat([torch.zeros_like(size_B2), size_B2], dim=-1)


def crops(image_BCHW, box_B4, side):
    """Every box of its picture, resized to a square."""
    cuts = [
        image[None, :, top : top + height, left : left + width]
        for image, (top, left, height, width) in zip(image_BCHW, box_B4.tolist())
    ]
    return torch.cat([F.interpolate(cut, (side, side), mode="bilinear", antialias=True) for cut in cuts])


def test_the_teacher_s_box_holds_every_view_and_stays_in_the_picture():
    """Regression: in A-CLIP's released code a view sticks out of 69-72 % of the boxes."""
    size_B2 = sizes(10_000)
    box_BV4 = draw_boxes(size_B2, 2, chance(1))
    assert box_BV4.dtype == torch.int64 and (box_BV4[..., :2] >= 0).all() and (box_BV4[..., 2:] >= 1).all()
    assert (box_BV4[..., :2] + box_BV4[..., 2:] <= size_B2[:, None]).all()
    teacher_B4 = draw_enclosing(box_BV4, size_B2, chance(2))
    stop_B2 = teacher_B4[:, :2] + teacher_B4[:, 2:]
    assert (teacher_B4[:, :2] >= 0).all() and (stop_B2 <= size_B2).all()
    assert (teacher_B4[:, None, :2] <= box_BV4[..., :2]).all()
    assert (stop_B2[:, None] >= box_BV4[..., :2] + box_BV4[..., 2:]).all()
    assert torch.equal(draw_enclosing(box_BV4, size_B2, chance(2)), teacher_B4)
    assert encloses(teacher_B4, box_BV4).all()
    for side in range(4):  # a pixel less at any side of a box and it holds that box no more
        tight_B4 = box_BV4[:, 0].clone()
        tight_B4[:, side % 2 + 2] -= 1
        tight_B4[:, side % 2] += side // 2
        assert encloses(box_BV4[:, 0], box_BV4[:, :1]).all() and not encloses(tight_B4, box_BV4[:, :1]).any()
    loose = (teacher_B4 != whole_boxes(size_B2)).any(1) & (box_BV4[:, 0] != teacher_B4).any(1)
    assert loose.float().mean() > 0.5, "boxes must be drawn, not just the whole picture or the tightest box"


def test_areas_and_ratios_lie_in_their_ranges():
    size_B2 = torch.tensor([[240, 320]]).expand(2000, 2)
    box_BV4 = draw_boxes(size_B2, 1, chance(), scale=(0.3, 0.6))[:, 0].float()
    area_B = box_BV4[:, 2] * box_BV4[:, 3] / (240 * 320)
    ratio_B = box_BV4[:, 3] / box_BV4[:, 2]
    assert area_B.min() > 0.295 and area_B.max() < 0.605 and area_B.std() > 0.07
    assert ratio_B.min() > 0.74 and ratio_B.max() < 1.35
    narrow = draw_boxes(torch.tensor([[10, 1000]]), 1, chance(), scale=(0.9, 1.0))[0, 0].tolist()
    assert narrow == [0, 494, 10, 13], "nothing fits: the largest centred box of a fitting ratio"


def test_a_picture_s_boxes_do_not_depend_on_its_neighbours():
    size_B2 = sizes(20)
    other_B2 = torch.cat([size_B2[:1], size_B2[1:].flip(0)])
    boxes = [draw_boxes(size, 2, chance()) for size in (size_B2, other_B2, size_B2[:1])]
    assert torch.equal(boxes[0][0], boxes[1][0]) and torch.equal(boxes[0][0], boxes[2][0])


# score maps


def box(*rows):
    return torch.tensor(rows)


def test_the_same_box_gives_the_same_map():
    score_BN = torch.randn(3, 35, generator=chance())
    own_B4 = box([3, 4, 50, 70], [0, 0, 10, 10], [7, 1, 93, 21])
    torch.testing.assert_close(map_scores(score_BN, (5, 7), own_B4, own_B4, (5, 7)), score_BN)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999))
def test_a_linear_map_stays_the_same_linear_function_of_the_picture(seed):
    """Away from the border of the teacher's cell centres, bilinear reading is exact for linear functions."""
    size_B2 = torch.tensor([[120, 160]]).expand(4, 2)
    view_BV4 = draw_boxes(size_B2, 2, chance(seed))
    teacher_B4 = whole_boxes(size_B2)
    a, b, c = torch.randn(3, generator=chance(seed)).tolist()

    def linear(box_B4, grid):
        y = box_B4[:, :1] + (torch.arange(grid[0]) + 0.5) / grid[0] * box_B4[:, 2:3]
        x = box_B4[:, 1:2] + (torch.arange(grid[1]) + 0.5) / grid[1] * box_B4[:, 3:]
        return (a * y[:, :, None] + b * x[:, None] + c).flatten(1), y, x

    score_BN, y_in, x_in = linear(teacher_B4, (24, 32))
    for view in range(2):
        expected, y, x = linear(view_BV4[:, view], (14, 14))
        found = map_scores(score_BN, (24, 32), teacher_B4, view_BV4[:, view], (14, 14))
        inner = (y >= y_in[:, :1]) & (y <= y_in[:, -1:]), (x >= x_in[:, :1]) & (x <= x_in[:, -1:])
        inner = (inner[0][:, :, None] & inner[1][:, None]).flatten(1)
        torch.testing.assert_close(found[inner], expected[inner], atol=1e-3, rtol=1e-4)
        assert inner.any()


def test_map_equals_scipy_s_bilinear_reading_a_picture_at_a_time():
    size_B2 = torch.tensor([[100, 130], [77, 40]])
    view_B4 = draw_boxes(size_B2, 1, chance(5))[:, 0]
    teacher_B4 = draw_enclosing(view_B4[:, None], size_B2, chance(6))
    score_BN = torch.randn(2, 14 * 14, generator=chance(7))
    found = map_scores(score_BN, (14, 14), teacher_B4, view_B4, (7, 7))
    for row in range(2):
        (top, left, height, width), (y0, x0, h, w) = teacher_B4[row].tolist(), view_B4[row].tolist()
        y = (y0 + (np.arange(7) + 0.5) / 7 * h - top) / height * 14 - 0.5
        x = (x0 + (np.arange(7) + 0.5) / 7 * w - left) / width * 14 - 0.5
        places = np.stack(np.meshgrid(y, x, indexing="ij"))
        expected = ndimage.map_coordinates(score_BN[row].view(14, 14).numpy(), places, order=1, mode="nearest")
        np.testing.assert_allclose(found[row].view(7, 7).numpy(), expected, atol=1e-4)


def test_a_peak_in_a_corner_lands_in_the_right_cell():
    score_BN = torch.zeros(4, 64)
    for row, cell in enumerate((0, 7, 56, 63)):
        score_BN[row, cell] = 1.0
    whole_B4 = box([0, 0, 80, 80]).expand(4, 4)
    corners = box([0, 0, 20, 20], [0, 60, 20, 20], [60, 0, 20, 20], [60, 60, 20, 20])
    found = map_scores(score_BN, (8, 8), whole_B4, corners, (2, 2))
    assert found.argmax(1).tolist() == [0, 1, 2, 3] and torch.equal(found.amax(1), torch.ones(4))


@pytest.mark.parametrize("shrink", [1, 2])
def test_from_a_bright_square_to_the_kept_blocks_of_each_view(shrink):
    """End to end: picture, boxes, crops, a teacher that scores brightness, selection in blocks."""
    B, size_B2 = 16, torch.tensor([[128, 128]]).expand(16, 2)
    image_BCHW = torch.zeros(B, 3, 128, 128)
    place_B2 = torch.randint(16, 56, (B, 2), generator=chance(8)).tolist()
    for row, (top, left) in enumerate(place_B2):
        image_BCHW[row, :, top : top + 64, left : left + 64] = 1.0
    view_BV4 = draw_boxes(size_B2, 2, chance(9))
    teacher_B4 = draw_enclosing(view_BV4, size_B2, chance(10))
    brightness = F.avg_pool2d(crops(image_BCHW, teacher_B4, 112 // shrink).mean(1, keepdim=True), 8)
    grid = tuple(brightness.shape[2:])
    seen = TeacherView(
        grid=grid,
        attention_BSN=brightness.flatten(1)[:, None],
        pooled_BC=torch.zeros(B, 1),
        feature_BD=torch.zeros(B, 1),
        box_B4=teacher_B4,
    )
    for view in range(2):
        view_BCHW = crops(image_BCHW, view_BV4[:, view], 112)
        context = MaskContext(
            image_BCHW=view_BCHW,
            patch_size=8,
            generator=chance(),
            teacher=seen,
            box_B4=view_BV4[:, view],
            block=2,
        )
        covered_BU = F.avg_pool2d(view_BCHW.mean(1, keepdim=True), 16).flatten(1)
        kept_BN = torch.zeros(B, 196).scatter(
            1, mask(MaskSpec(masker="attentive", keep=0.5, block=2), context).keep_BK, 1
        )
        kept_BU = F.avg_pool2d(kept_BN.view(B, 1, 14, 14), 2).flatten(1).bool()
        assert (covered_BU > 0.99).sum(1).float().mean() > 3
        assert kept_BU[covered_BU > 0.99].all(), "a block that lies in the square was dropped"
        near_BU = F.max_pool2d(covered_BU.view(B, 1, 7, 7), 3, 1, 1).flatten(1) > 0
        enough_B = (covered_BU > 0.25).sum(1) >= 25
        assert not (kept_BU & ~near_BU)[enough_B].any(), "a far block was kept while the square had more"
        assert enough_B.any()
