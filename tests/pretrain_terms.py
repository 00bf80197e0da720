"""Encoded batches of six pictures and captions by the smallest towers, and the losses that read them."""

import torch

from patchrank.pretrain.objectives import Encoded, Objectives, Widths
from patchrank.pretrain.teacher import Teacher
from patchrank.text import TextConfig, TextTower, tokenize

SMALL = {
    "simclr": dict(hidden=16, out=8),
    "byol": dict(hidden=16, out=8),
    "distill": dict(num_codes=12),
    "mlm": dict(num_layers=1),
}
TEXTS = ["a red bird", "two dogs on a beach", "snow", "a man with a very long caption that is cut", "sea", "a cat"]


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def make_text():
    """A text tower whose features are as wide as the image tower's."""
    torch.manual_seed(0)
    return TextTower(TextConfig(context=16, width=32, num_layers=1, num_heads=2, mlp_width=64, output_dim=24))


def build(tower, text, *names, **weights):
    torch.manual_seed(3)
    terms = {name: (weights.get(name, 1.0), SMALL.get(name, {})) for name in names}
    return Objectives(terms, Widths.of(tower, text))


def encode(tower, text, objectives, seed=0, num_views=2, **changes):
    """Everything that any objective needs, of six pictures."""
    view_VBCHW = torch.randn(num_views, 6, 3, 32, 32, generator=chance(seed))
    pooled_VBT = torch.stack([tower.finish_pooled(tower.embed(view), 0) for view in view_VBCHW])
    token_BL = tokenize(TEXTS, 16)
    teacher = Teacher(tower, objectives.followed)
    return Encoded(
        **dict(
            feature_VBD=tower.proj(pooled_VBT),
            pooled_VBT=pooled_VBT,
            text_BD=text(token_BL),
            scale=torch.tensor(5.0),
            teacher=teacher.look(view_VBCHW[0], patches=True),
            teacher_heads=teacher.heads,
            tower=tower,
            image_BCHW=view_VBCHW[0],
            text_tower=text,
            token_BL=token_BL,
            generator=chance(seed),
        )
        | changes
    )
