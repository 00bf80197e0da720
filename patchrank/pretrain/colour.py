"""Random changes of colour, one draw a picture: what the papers do to views beside cropping.

All draws of a batch are made at once from a CPU generator, one row a picture, so that a part of a batch gets the same
changes as the whole. Letters: B pictures, C, H, W of a view.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Colour:
    """How strongly and how often."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    """In turns of the colour circle."""
    jitter_chance: float = 0.8
    gray_chance: float = 0.2
    blur_chance: float = 0.0
    blur: tuple[float, float] = (0.1, 2.0)
    """Standard deviation at 224 pixels a side; smaller pictures get proportionally less."""
    solarize_chance: float = 0.0
    flip_chance: float = 0.0


COLOURS: dict[str, Colour | None] = {
    "none": None,
    "aclip": Colour(saturation=0.2, blur_chance=0.1, solarize_chance=0.2),
    "slip": Colour(blur_chance=0.5, flip_chance=0.5),
}
"""aclip: A-CLIP's released code. slip: the two self-supervised views of SLIP (Mu et al. 2022). Deviation: the four
parts of the jitter come in a fixed order."""

NUM_DRAWS = 10
_GRAY = (0.299, 0.587, 0.114)


def change(image_BCHW: Tensor, colour: Colour | None, draw_BX: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) float32 in [0, 1] with their colours changed; draws (B, NUM_DRAWS) uniform in [0, 1)."""
    if colour is None:
        return image_BCHW
    draw_XB111 = draw_BX.T[:, :, None, None, None]
    jittered = _jitter(image_BCHW, colour, draw_XB111[:4])
    image_BCHW = torch.where(draw_XB111[4] < colour.jitter_chance, jittered, image_BCHW)
    image_BCHW = torch.where(draw_XB111[5] < colour.gray_chance, _gray(image_BCHW), image_BCHW)
    if colour.blur_chance > 0:
        image_BCHW = _blurred(image_BCHW, colour, draw_BX[:, 6], draw_BX[:, 7])
    inverted = torch.where(image_BCHW >= 0.5, 1 - image_BCHW, image_BCHW)
    image_BCHW = torch.where(draw_XB111[8] < colour.solarize_chance, inverted, image_BCHW)
    return torch.where(draw_XB111[9] < colour.flip_chance, image_BCHW.flip(-1), image_BCHW)


def _gray(image_BCHW: Tensor) -> Tensor:
    weight_C11 = torch.tensor(_GRAY, device=image_BCHW.device)[:, None, None]
    return (image_BCHW * weight_C11).sum(1, keepdim=True).expand_as(image_BCHW)


def _jitter(image_BCHW: Tensor, colour: Colour, draw_XB111: Tensor) -> Tensor:
    """Brightness, contrast, saturation, hue, as torchvision's ColorJitter defines them."""
    brightness, contrast, saturation = (
        1 + strength * (2 * draw - 1)
        for strength, draw in zip((colour.brightness, colour.contrast, colour.saturation), draw_XB111)
    )
    image_BCHW = (image_BCHW * brightness).clamp(0, 1)
    mean_B111 = _gray(image_BCHW).mean((1, 2, 3), keepdim=True)
    image_BCHW = (mean_B111 + (image_BCHW - mean_B111) * contrast).clamp(0, 1)
    gray = _gray(image_BCHW)
    image_BCHW = (gray + (image_BCHW - gray) * saturation).clamp(0, 1)
    return _turned(image_BCHW, colour.hue * (2 * draw_XB111[3] - 1))


def _turned(image_BCHW: Tensor, turn_B111: Tensor) -> Tensor:
    """Turn the hue, brightness kept: a rotation of the colour plane.

    Deviation: in the YIQ plane, which is linear, instead of HSV.
    """
    forward = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    angle_B = 2 * torch.pi * turn_B111.flatten()
    cosine_B, sine_B, zero_B = angle_B.cos(), angle_B.sin(), torch.zeros_like(angle_B)
    rotation_B33 = torch.stack(
        [zero_B + 1, zero_B, zero_B, zero_B, cosine_B, -sine_B, zero_B, sine_B, cosine_B], dim=1
    ).view(-1, 3, 3)
    forward = forward.to(image_BCHW.device)
    whole_B33 = torch.linalg.inv(forward) @ rotation_B33 @ forward
    return torch.einsum("bij,bjhw->bihw", whole_B33, image_BCHW).clamp(0, 1)


def _blurred(image_BCHW: Tensor, colour: Colour, lot_B: Tensor, size_B: Tensor) -> Tensor:
    """Gaussian blur of the pictures whose lot says so."""
    chosen = (lot_B < colour.blur_chance).nonzero().flatten()
    if len(chosen) == 0:
        return image_BCHW
    side = image_BCHW.shape[-1]
    least, most = colour.blur
    sigma_n = (least + (most - least) * size_B[chosen]) * side / 224
    reach = max(1, round(3 * most * side / 224))
    offset_T = torch.arange(-reach, reach + 1, device=image_BCHW.device)
    weight_nT = (-(offset_T**2) / (2 * sigma_n[:, None] ** 2)).exp()
    weight_nT = (weight_nT / weight_nT.sum(1, keepdim=True)).repeat_interleave(3, 0)
    planes = F.pad(image_BCHW[chosen], (reach,) * 4, mode="replicate").flatten(0, 1)[None]
    planes = F.conv2d(planes, weight_nT[:, None, :, None], groups=len(weight_nT))
    planes = F.conv2d(planes, weight_nT[:, None, None, :], groups=len(weight_nT))
    return image_BCHW.index_copy(0, chosen, planes[0].unflatten(0, (-1, 3)))
