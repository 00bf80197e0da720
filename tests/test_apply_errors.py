"""What `patchrank.apply` refuses: models by name, mistaken arguments by value, rule and remedy."""

from collections.abc import Callable

import pytest
import transformers
from test_apply import SPEC, TEXT, VISION, open_clip, open_clip_model, timm, timm_model
from test_loading_towers import HF_TEXT, make_hf
from torch import nn

import patchrank
from patchrank import PruneSpec
from patchrank.errors import UserError


def coca() -> nn.Module:
    multimodal = {"width": 32, "heads": 4, "layers": 1, "context_length": 8, "vocab_size": 60}
    return open_clip.CoCa(24, multimodal, TEXT | {"embed_cls": True}, VISION | {"attentional_pool": True})


def resnet_clip() -> nn.Module:
    return open_clip.CLIP(24, {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}, TEXT)


def wrapped() -> nn.Module:
    return nn.DataParallel(open_clip_model())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (coca, "CoCa: .*not supported.*CLIP, CustomTextCLIP"),
        (resnet_clip, "CLIP: .*ModifiedResNet"),
        (lambda: timm.create_model("test_resnet"), "ResNet.*not timm's VisionTransformer"),
        (lambda: timm_model(qk_norm=True), "qk_norm"),
        (
            lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**HF_TEXT)),
            "CLIPTextModel: .*not supported; use one of CLIPModel",
        ),
        (wrapped, "DataParallel: must be a model of open_clip, timm, transformers"),
        (lambda: nn.Linear(2, 2), "Linear: must be a model of"),
        (lambda: "ViT-B-16", "str: must be a model of"),
        (lambda: patchrank.apply(open_clip_model(), spec=SPEC), "CLIP: pruned already"),
        (lambda: patchrank.apply(timm_model(), spec=SPEC), "PrunedVisionTransformer: pruned already"),
        (lambda: patchrank.apply(make_hf("CLIPModel"), keep=0.5), "CLIPModel: pruned already"),
    ],
)
def test_other_objects_are_refused_by_name(build: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        patchrank.apply(build(), keep=0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one of"),
        ({"keep": 0.5, "macs": 0.7}, "exactly one of"),
        ({"keep": 0.5, "scorer": "psychic"}, "scorer='psychic': unknown; choose one of random, checkerboard"),
        ({"keep": 0.5, "scorer": 3}, "scorer=3: must be a name or a callable"),
        ({"spec": PruneSpec(cuts=((1, 0.5),), num_added=1)}, "num_added=1"),
        ({"macs": 0.01}, "macs=0.01: this image tower reaches"),
    ],
)
def test_mistakes_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        patchrank.apply(open_clip_model(), **arguments)
