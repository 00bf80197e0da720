"""`patchrank.apply`: what each library's users call and read on the copy besides the feature."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_apply import KINDS, SPEC, TOKENS, gap, hf_features, open_clip_model, timm_model
from test_loading_towers import HF_TEXT, make_hf
from torch import Tensor

import patchrank
from patchrank.data import batches, load_dataset
from patchrank.errors import UserError
from patchrank.loading import load_clip


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def test_open_clip_forward_and_text(images: Tensor) -> None:
    model = open_clip_model()
    applied = patchrank.apply(model, spec=SPEC)
    image_BD, text_BD, scale = applied(images, TOKENS)
    assert torch.equal(image_BD, applied.encode_image(images, normalize=True))
    assert torch.allclose(image_BD.norm(dim=-1), torch.ones(3))
    assert torch.equal(text_BD, model.encode_text(TOKENS, normalize=True)) and scale == model.logit_scale.exp()
    assert applied.get_logits(images, TOKENS)[0].shape == (3, 3)
    as_dict = patchrank.apply(open_clip_model(output_dict=True), spec=SPEC)(images, TOKENS)
    assert torch.equal(as_dict["image_features"], image_BD)


def test_open_clip_attributes_stay_readable() -> None:
    model = open_clip_model()
    applied = patchrank.apply(model, spec=SPEC)
    for name in (
        "image_size",
        "patch_size",
        "grid_size",
        "output_tokens",
        "output_dim",
        "preprocess_cfg",
        "image_mean",
    ):
        assert getattr(applied.visual, name) == getattr(model.visual, name)
    assert applied.visual.preprocess_cfg is not model.visual.preprocess_cfg
    assert applied.context_length == 8


@pytest.mark.parametrize("vision", [{}, {"pool_type": "avg", "final_ln_after_pool": True}])
def test_open_clip_output_tokens(vision: dict, images: Tensor) -> None:
    model = open_clip_model(vision=vision)
    for candidate in (model, whole := patchrank.apply(model, keep=1.0), folded := patchrank.apply(model, keep=0.5)):
        candidate.visual.output_tokens = True
    dense_BD, dense_BNC = model.visual(images)
    feature_BD, tokens_BNC = whole.visual(images)
    assert gap(feature_BD, dense_BD) < 1e-5 and gap(tokens_BNC, dense_BNC) < 1e-5
    feature_BD, tokens_BNC = folded.visual(images)
    assert tokens_BNC.shape == dense_BNC.shape
    assert tokens_BNC[0].unique(dim=0).shape[0] == 8, "8 of 16 patches stand for all"
    folded.visual.output_tokens = False
    assert gap(feature_BD, folded.visual(images)) < 1e-5


def test_open_clip_image_of_another_size_is_refused() -> None:
    applied = patchrank.apply(open_clip_model(), spec=SPEC)
    with pytest.raises(UserError, match="image of 40 x 32: this pruned tower takes 32 x 32"):
        applied.encode_image(torch.zeros(1, 3, 40, 32))
    with pytest.raises(UserError, match="forward_intermediates"):
        applied.forward_intermediates(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["timm class token", "timm mean", "timm attention"])
@pytest.mark.parametrize("rest", ["fold", "drop"])
def test_timm_features_and_head(name: str, rest: str, images: Tensor) -> None:
    model = KINDS[name].build()
    applied = patchrank.apply(model, keep=0.5, rest=rest)
    tokens_BLC = applied.forward_features(images)
    num_prefix = model.num_prefix_tokens
    assert tokens_BLC.shape[1] == num_prefix + (16 if rest == "fold" else 8)
    assert gap(applied.forward_head(tokens_BLC), applied(images)) < 1e-5
    assert applied.forward_head(tokens_BLC, pre_logits=True).shape == (3, 32)
    whole = patchrank.apply(model, keep=1.0)
    assert gap(whole.forward_features(images), model.forward_features(images)) < 1e-5


def test_timm_attributes_and_new_heads(images: Tensor) -> None:
    model = timm_model()
    applied = patchrank.apply(model, spec=SPEC)
    assert applied.patch_embed.grid_size == (4, 4) and len(applied.blocks) == 4 and applied.num_classes == 10
    applied.reset_classifier(5)
    assert applied(images).shape == (3, 5) and model(images).shape == (3, 10)
    for refused in (
        lambda: applied.reset_classifier(5, "avg"),
        lambda: applied.set_input_size((64, 64)),
        lambda: applied.forward_intermediates(images),
        lambda: applied.get_intermediate_layers(images),
        lambda: applied.prune_intermediate_layers(1),
        lambda: applied(torch.zeros(1, 3, 64, 64)),
    ):
        with pytest.raises(UserError):
            refused()


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_hugging_face_two_towers(name: str, images: Tensor) -> None:
    model = make_hf(name, num_hidden_layers=4)
    applied = patchrank.apply(model, spec=SPEC)
    arguments = {"input_ids": TOKENS.clamp_max(HF_TEXT["vocab_size"] - 1), "pixel_values": images}
    dense, found = model(**arguments), applied(**arguments)
    assert found.keys() == dense.keys() and found.logits_per_image.shape == (3, 3)
    assert torch.equal(found.text_embeds, dense.text_embeds)
    assert gap(found.image_embeds, dense.image_embeds) > 1e-3
    features_BD = hf_features(applied, images)
    assert gap(found.image_embeds, features_BD / features_BD.norm(dim=-1, keepdim=True)) < 1e-5
    assert isinstance(applied(**arguments, return_dict=False), tuple)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel"])
def test_hugging_face_last_hidden_state(name: str, images: Tensor) -> None:
    model = make_hf(name, num_hidden_layers=4)
    dense_BLC = model(images).last_hidden_state
    assert gap(patchrank.apply(model, keep=1.0)(images).last_hidden_state, dense_BLC) < 1e-5
    assert patchrank.apply(model, keep=0.5)(images).last_hidden_state.shape == dense_BLC.shape
    dropped_BLC = patchrank.apply(model, keep=0.5, rest="drop")(images).last_hidden_state
    assert dropped_BLC.shape[1] == dense_BLC.shape[1] - 8
    assert patchrank.apply(model, keep=0.5)(images, return_dict=False)[0].shape == dense_BLC.shape


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_hugging_face_inner_outputs_are_refused(option: str, images: Tensor) -> None:
    model = make_hf("CLIPVisionModel", num_hidden_layers=4)
    with pytest.raises(UserError, match=f"{option}=True"):
        patchrank.apply(model, spec=SPEC)(images, **{option: True})


def test_hugging_face_config_that_asks_for_inner_outputs_is_refused() -> None:
    model = make_hf("CLIPVisionModel", num_hidden_layers=4)
    model.config.output_hidden_states = True
    with pytest.raises(UserError, match="CLIPVisionModel: its config asks for output_hidden_states"):
        patchrank.apply(model, spec=SPEC)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel"])
def test_hugging_face_image_of_another_size_is_refused(name: str) -> None:
    applied = patchrank.apply(make_hf(name, num_hidden_layers=4), spec=SPEC)
    with pytest.raises(UserError, match="image of 64 x 64"):
        applied(torch.zeros(1, 3, 64, 64), interpolate_pos_encoding=True)


@pytest.mark.assets
def test_the_one_line_on_real_weights_and_images(assets: Path) -> None:
    """70 % of the MACs keep the logits of a real classifier nearly where they were, and mostly its answers."""
    import timm  # after test_apply has made torchvision importable

    path = assets / "weights" / "vit_tiny_patch16_224_tiny-imagenet.safetensors"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=200).eval()
    model.load_state_dict(load_file(path))
    dataset = load_dataset("tiny-imagenet", assets / "data", "train")
    dataset.images[:] = dataset.images[::400]
    (batch,) = batches(dataset, load_clip(str(path)).preprocess, len(dataset.images), broken=[])
    image_BCHW = batch[1]
    dense, pruned = model(image_BCHW), patchrank.apply(model, macs=0.7)(image_BCHW)
    assert torch.cosine_similarity(pruned, dense).mean() > 0.95
    assert (pruned.argmax(-1) == dense.argmax(-1)).float().mean() > 0.8
