"""What every masker keeps, as one picture: a row an image, a column a masker, hidden patches darkened.

Letters: B pictures, C, H, W, N patches.
"""

import io

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from patchrank.atomic import write_bytes
from patchrank.pretrain.learner import Learner
from patchrank.pretrain.maskers import MASKERS, MaskContext, MaskSpec, mask
from patchrank.pretrain.teacher import Teacher
from patchrank.text import tokenize

_LINE = 14
"""Pixels of a heading."""


@torch.no_grad()
def kept_patches(learner: Learner, image_BCHW: Tensor, texts: list[str], spec: MaskSpec) -> Tensor:
    """Which patches a mask keeps of pictures (B, 3, H, W), normalised: (B, N) bool; the teacher sees the same view."""
    tower, needs = learner.pair.tower, MASKERS[spec.masker].needs
    teacher = learner.teacher or Teacher(tower)
    token_BL = tokenize(texts, learner.pair.text.config.context)
    context = MaskContext(
        image_BCHW=image_BCHW,
        patch_size=tower.config.patch_size,
        generator=torch.Generator().manual_seed(0),
        progress=0.5,
        pixel_std=learner.config.preprocess().std,
        token_BNC=tower.embed(image_BCHW)[:, tower.config.num_prefix :],
        teacher=teacher.look(image_BCHW, patches=True) if "teacher" in needs else None,
        text_BD=learner.pair.text(token_BL) if "text" in needs else None,
        block=spec.block,
    )
    chosen = mask(spec, context)
    real_BK = torch.ones_like(chosen.keep_BK, dtype=torch.bool) if chosen.valid_BK is None else chosen.valid_BK
    return torch.zeros(len(image_BCHW), tower.config.num_patches, dtype=torch.bool).scatter(1, chosen.keep_BK, real_BK)


def draw_masks(path, learner: Learner, image_BCHW: Tensor, texts: list[str], keep: float) -> None:
    """Write a PNG with the pictures and what each row of MASKERS keeps of them at one ratio.

    Args: pictures (B, 3, H, W), normalised; one caption each. Attentive masks work on blocks of 2 x 2 where they fit.
    """
    side, grid = learner.pair.tower.config.patch_size, learner.pair.tower.config.grid
    mean_C11, std_C11 = (torch.tensor(value)[:, None, None] for value in
                         (learner.config.preprocess().mean, learner.config.preprocess().std))  # fmt: skip
    shown_BCHW = (image_BCHW * std_C11 + mean_C11).clamp(0, 1)
    columns = {"picture": shown_BCHW}
    for name in MASKERS:
        even = grid[0] % 2 == 0 and grid[1] % 2 == 0
        spec = MaskSpec(masker=name, keep=keep, block=2 if name.startswith(("attentive", "text")) and even else 1)
        kept_BN = kept_patches(learner, image_BCHW, texts, spec)
        light_B1RC = torch.where(kept_BN, 1.0, 0.15).view(-1, 1, *grid)
        columns[name] = shown_BCHW * light_B1RC.repeat_interleave(side, 2).repeat_interleave(side, 3)
    write_bytes(path, _png(columns))


def _png(columns: dict[str, Tensor]) -> bytes:
    first = next(iter(columns.values()))
    num_rows, H, W = first.shape[0], *first.shape[2:]
    width = max(W + 2, 7 * max(map(len, columns)))
    sheet = Image.new("RGB", (width * len(columns), _LINE + num_rows * (H + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (name, image_BCHW) in enumerate(columns.items()):
        pen.text((column * width, 1), name, fill="black")
        for row, image_CHW in enumerate(image_BCHW):
            pixels = image_CHW.mul(255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels), (column * width, _LINE + row * (H + 2)))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
