"""Our tower against open_clip, timm and transformers with the same random weights, for every family and option."""

from functools import partial

import pytest
import torch
from torch import nn

from patchrank.checkpoints import tower_from_hf, tower_from_open_clip, tower_from_timm
from patchrank.checkpoints.open_clip_loader import named_config
from patchrank.errors import UserError
from patchrank.torchvision_shim import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: E402
import timm.layers  # noqa: E402
import transformers  # noqa: E402
from open_clip.timm_model import TimmModel  # noqa: E402
from open_clip.transformer import QuickGELU, VisionTransformer  # noqa: E402
from timm.models import vision_transformer as timm_vit  # noqa: E402


def shuffle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights large enough that every part of the model changes the output; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.ndim < 2 else 1.5 * parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model.eval()


def agree(tower: nn.Module, model, size: tuple[int, int], num_images: int = 3) -> None:
    """Same output to 1e-5 of its size, on images whose outputs differ a thousand times more than that."""
    image_BCHW = torch.randn(num_images, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_BD, found_BD = model(image_BCHW), tower(image_BCHW)
    scale = expected_BD.abs().amax()
    assert found_BD.shape == expected_BD.shape
    assert num_images == 1 or (expected_BD[0] - expected_BD[1]).abs().amax() > 1e-2 * scale
    assert (found_BD - expected_BD).abs().amax() <= 1e-5 * scale


NATIVE = {
    "laion": {},
    "openai quick GELU": {"act_layer": QuickGELU},
    "layer scale": {"ls_init_value": 0.3},
    "clipa": {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"},
    "mean pool, norm first": {"pool_type": "avg"},
    "class token, norm last": {"final_ln_after_pool": True},
    "not square": {"image_size": (16, 40)},
    "remainder": {"image_size": 37},
    "epsilon": {"norm_layer": partial(nn.LayerNorm, eps=0.1)},
    "head dim 16": {"heads": 2},
}


@pytest.mark.parametrize("options", NATIVE.values(), ids=NATIVE)
def test_open_clip_native(options: dict) -> None:
    base = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "heads": 4, "mlp_ratio": 2.0, "output_dim": 24}
    visual = shuffle(VisionTransformer(**(base | options)))
    agree(tower_from_open_clip(visual), visual, visual.image_size)


TIMM = {
    "plain": {},
    "mean pool, fc_norm": {"global_pool": "avg"},
    "mean pool, norm first": {"global_pool": "avg", "fc_norm": False},
    "class token, fc_norm": {"fc_norm": True},
    "no final norm": {"final_norm": False},
    "registers": {"reg_tokens": 4},
    "registers, positions of patches only": {"reg_tokens": 4, "no_embed_class": True, "class_token": False}
    | {"global_pool": "avg"},
    "class token without position": {"no_embed_class": True},
    "layer scale": {"init_values": 0.3},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": nn.LayerNorm},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "no bias of q, k, v": {"qkv_bias": False},
    "siglip": {"global_pool": "map", "class_token": False},
    "siglip, fc_norm": {"global_pool": "map", "class_token": False, "fc_norm": True},
    "siglip over prefix": {"global_pool": "map", "reg_tokens": 2, "pool_include_prefix": True},
    "no positions": {"pos_embed": "none"},
    "dynamic size": {"dynamic_img_size": True},
    "not square": {"img_size": (16, 40)},
    "epsilon": {"norm_layer": partial(nn.LayerNorm, eps=0.1)},
    "no head": {"num_classes": 0},
}
TIMM_BASE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}


@pytest.mark.parametrize("options", TIMM.values(), ids=TIMM)
def test_timm(options: dict) -> None:
    model = shuffle(timm_vit.VisionTransformer(**(TIMM_BASE | {"num_classes": 10} | options)))
    agree(tower_from_timm(model), model, model.patch_embed.img_size)
    agree(
        tower_from_timm(model, head=False),
        lambda image: model.forward_head(model.forward_features(image), pre_logits=True),
        model.patch_embed.img_size,
    )


@pytest.mark.parametrize(("pool", "proj"), [("map", "none"), ("token", None), ("avg", "linear")])
def test_open_clip_timm_trunk(pool: str, proj: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(name: str, num_classes: int = 1000, global_pool: str = "avg", **_) -> nn.Module:
        class_token = global_pool == "token"
        options = {"num_classes": num_classes, "global_pool": global_pool, "class_token": class_token}
        model = timm_vit.VisionTransformer(**(TIMM_BASE | options))
        model.default_cfg = {}
        return model

    monkeypatch.setattr(timm, "create_model", tiny)
    visual = shuffle(TimmModel("tiny", embed_dim=24, image_size=32, pool=pool, proj=proj, proj_bias=True))
    agree(tower_from_open_clip(visual), visual, (32, 32))


HF_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4} | {
    "image_size": 32,
    "patch_size": 8,
}
HF_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4} | {
    "vocab_size": 60,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "projection_size": 32,
}


def make_hf(name: str, **vision) -> nn.Module:
    """A tiny random transformers model of this class."""
    vision = HF_VISION | vision
    if name == "CLIPModel":
        config = transformers.CLIPConfig(vision_config=vision, text_config=HF_TEXT, projection_dim=24)
    elif name == "SiglipModel":
        config = transformers.SiglipConfig(vision_config=vision, text_config=HF_TEXT)
    elif name.startswith("CLIP"):
        config = transformers.CLIPVisionConfig(**vision, projection_dim=24)
    else:
        config = transformers.SiglipVisionConfig(**vision)
    return shuffle(getattr(transformers, name)(config))


def hf_feature(model: nn.Module):
    """The image feature that users of the class read."""
    if hasattr(model, "get_image_features"):
        return lambda image: getattr(feature := model.get_image_features(pixel_values=image), "pooler_output", feature)
    if type(model).__name__.endswith("WithProjection"):
        return lambda image: model(pixel_values=image).image_embeds
    return lambda image: model(pixel_values=image).pooler_output


@pytest.mark.parametrize(
    "name", ["CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipModel", "SiglipVisionModel"]
)
@pytest.mark.parametrize("options", [{}, {"hidden_act": "gelu", "image_size": 37, "layer_norm_eps": 1e-3}])
def test_hugging_face(name: str, options: dict) -> None:
    model = make_hf(name, **options)
    size = options.get("image_size", 32)
    agree(tower_from_hf(model), hf_feature(model), (size, size))


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: VisionTransformer(32, 8, 32, 1, 4, 2.0, attentional_pool=True, output_dim=32), "attentional pooler"),
        (lambda: VisionTransformer(32, 8, 32, 1, 4, 2.0, output_dim=32, qk_norm=True), "normalised"),
        (lambda: open_clip.modified_resnet.ModifiedResNet((1, 1, 1, 1), 16, 2, 32, 8), "ModifiedResNet"),
    ],
)
def test_other_open_clip_towers_are_refused_by_name(build, word: str) -> None:
    with pytest.raises(UserError, match=f"some-model: .*not supported: .*{word}"):
        tower_from_open_clip(build(), name="some-model")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"norm_layer": timm.layers.RmsNorm}, "LayerNorm"),
        ({"mlp_layer": timm.layers.SwiGLU}, "MLP"),
        ({"global_pool": "map", "reg_tokens": 2}, "prefix"),
        ({"global_pool": "max"}, "max"),
        ({"proj_bias": False}, "bias"),
        ({"act_layer": "silu"}, "SiLU"),
        ({"in_chans": 1}, "RGB"),
        ({"scale_mlp_norm": True}, "norm"),
        ({"block_fn": timm_vit.ParallelScalingBlock}, "blocks"),
    ],
)
def test_other_timm_options_are_refused_by_name(options: dict, word: str) -> None:
    model = timm_vit.VisionTransformer(**(TIMM_BASE | options))
    with pytest.raises(UserError, match=f"not supported: .*{word}"):
        tower_from_timm(model)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "resnet18", "naflexvit_base_patch16_gap", "convnext_atto"])
def test_other_timm_classes_are_refused_by_name(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UserError, match=f"{name}: .*not supported: its class is {type(model).__name__}"):
        tower_from_timm(model, name=name)


def test_other_hugging_face_models_are_refused_by_name() -> None:
    siglip = make_hf("SiglipVisionModel", vision_use_head=False)
    with pytest.raises(UserError, match="vision_use_head"):
        tower_from_hf(siglip)
    classifier = transformers.CLIPForImageClassification(
        transformers.CLIPConfig(vision_config=HF_VISION, text_config=HF_TEXT, projection_dim=24)
    )
    with pytest.raises(UserError, match="CLIPForImageClassification"):
        tower_from_hf(classifier)


def test_towers_own_their_weights_in_the_dtype_of_the_model() -> None:
    visual = shuffle(VisionTransformer(32, 8, 32, 2, 4, 2.0, output_dim=24)).to(torch.bfloat16)
    tower = tower_from_open_clip(visual)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    assert not tower.training and not any(parameter.requires_grad for parameter in tower.parameters())
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP"])
def test_full_size_open_clip(name: str) -> None:
    visual = shuffle(open_clip.create_model(name, pretrained=None, load_weights=False).visual)
    agree(tower_from_open_clip(visual), visual, (224, 224), num_images=1)


NAMED = {
    "ViT-B-32": (True, "class"),
    "ViT-B-32-quickgelu": (True, "quick_gelu"),
    "ViT-B-16-SigLIP2": (True, "attention"),
    "ViT-L-14-CLIPA": (True, "after_pool"),
    "vit_medium_patch16_gap_256": (True, "mean"),
    "xlm-roberta-base-ViT-B-32": (True, "class"),
    "RN50": (False, "ModifiedResNet"),
    "EVA02-B-16": (False, "Eva"),
    "convnext_base": (False, "ConvNeXt"),
    "coca_ViT-B-32": (False, "attentional pooler"),
    "MobileCLIP-B": (False, "patch embedding"),
    "PE-Core-T-16-384": (False, "Eva"),
    "ViTamin-S": (False, "patch embedding"),
}


@pytest.mark.parametrize("name", NAMED)
def test_open_clip_names(name: str) -> None:
    supported, word = NAMED[name]
    if supported:
        config = named_config(name)
        assert word in (config.pool, config.activation, config.norm)
    else:
        with pytest.raises(UserError, match=f"{name}: .*not supported: .*{word}"):
            named_config(name)


@pytest.mark.slow
@pytest.mark.system
def test_every_open_clip_name_is_supported_or_refused_by_name() -> None:
    refusals = {}
    for name in open_clip.list_models():
        try:
            named_config(name)
        except UserError as error:
            refusals[name] = str(error)
    assert len(refusals) <= len(open_clip.list_models()) - 80
    for name, refusal in refusals.items():
        assert refusal.startswith(f"{name}: this tower is not supported: ")
