"""`load_clip` end to end: every kind of source, against the library that the weights come from."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from PIL import Image
from safetensors.torch import load_file, save_file
from test_loading_towers import agree, hf_feature, make_hf, shuffle
from test_text import make_text_tower

from patchrank.checkpoints import weights_hash
from patchrank.loading import class_matrix, load_clip, save_clip
from patchrank.preprocess import Preprocess
from patchrank.torchvision_shim import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: E402
import timm  # noqa: E402

TEMPLATES = ("a photo of a {}.", "art of the {}.")
NAMES = ["cat", "dog", "red fox"]
DATASET = SimpleNamespace(name="pets", class_names=NAMES, templates=TEMPLATES)
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1},
}
PREPROCESS = Preprocess(image_size=(32, 32), resize=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture
def picture() -> Image.Image:
    pixels = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def tiny_open_clip(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A small model under the open_clip name "tiny-clip"."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", OPEN_CLIP)
    return shuffle(open_clip.create_model("tiny-clip", load_weights=False))


def check_open_clip(clip, model: torch.nn.Module, picture: Image.Image) -> None:
    """Images, texts, class matrix, transform and scale equal open_clip's own."""
    agree(clip.tower, model.encode_image, (32, 32))
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    with torch.no_grad():
        text_BD = model.encode_text(tokenizer(NAMES), normalize=True)
    torch.testing.assert_close(clip.text(NAMES), text_BD, rtol=0, atol=1e-5)
    expected_DY = open_clip.build_zero_shot_classifier(
        model, tokenizer, NAMES, [lambda name, t=t: t.format(name) for t in TEMPLATES]
    )
    weight_DY, bias_Y = class_matrix(clip, DATASET)
    torch.testing.assert_close(weight_DY, expected_DY, rtol=0, atol=1e-5)
    assert bias_Y is None and (weight_DY[:, 0] - weight_DY[:, 1]).abs().max() > 1e-3
    assert clip.text.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    transform = open_clip.image_transform(32, is_train=False)
    torch.testing.assert_close(clip.preprocess(picture), transform(picture), rtol=0, atol=1e-6)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_open_clip_name_with_a_local_file(suffix: str, tiny_open_clip, picture, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        state = {f"module.{name}": tensor for name, tensor in tiny_open_clip.state_dict().items()}
        state["module.logit_scale"] = state["module.logit_scale"].reshape(1)
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        save_file(tiny_open_clip.state_dict(), path)
    clip = load_clip("tiny-clip", str(path))
    assert (clip.model_name, clip.pretrained) == ("tiny-clip", path.name)
    check_open_clip(clip, tiny_open_clip, picture)


def test_open_clip_folder(tiny_open_clip, picture, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    save_file(tiny_open_clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    check_open_clip(load_clip(str(tmp_path)), tiny_open_clip, picture)


def test_timm_name_with_a_local_file(picture, tmp_path: Path) -> None:
    name = "test_vit"
    model = shuffle(timm.create_model(name, num_classes=3))
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    for clip in (load_clip(name, str(path)), load_clip(f"timm:{name}@{path}")):
        weight_DY, bias_Y = class_matrix(clip, DATASET)
        agree(
            lambda image, clip=clip, w=weight_DY, b=bias_Y: clip.tower(image) @ w + b,
            model,
            clip.tower.config.image_size,
        )
        config = timm.data.resolve_model_data_config(model)
        transform = timm.data.create_transform(**config, is_training=False)
        torch.testing.assert_close(clip.preprocess(picture), transform(picture), rtol=0, atol=1e-6)


def test_timm_file_metadata_names_architecture_and_transform(tmp_path: Path) -> None:
    model = shuffle(timm.create_model("test_vit", num_classes=0))
    height = model.patch_embed.img_size[0]
    path = tmp_path / "weights.safetensors"
    metadata = {"arch": "test_vit", "mean": "0.1, 0.2, 0.3", "std": "0.4", "interpolation": "bilinear"}
    save_file(model.state_dict(), path, metadata | {"crop": f"resize 200, centre crop {height}"})
    clip = load_clip(str(path))
    assert clip.class_head is None and clip.text is None
    assert clip.preprocess == Preprocess(
        image_size=(height, height),
        resize=200,
        interpolation="bilinear",
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.4, 0.4),
    )


CLIP_PROCESSOR = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True} | {
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
    "resample": 3,
}
SIGLIP_PROCESSOR = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of the tiny vocabulary, in transformers' format."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "photo", "art", "of", "the", "cat", "dog", "red", "fox", "."]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $0 </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.mark.parametrize(("name", "config"), [("CLIPModel", CLIP_PROCESSOR), ("SiglipModel", SIGLIP_PROCESSOR)])
@pytest.mark.parametrize("layout", ["one file", "shards", "pickle", "old"])
def test_hugging_face_folder(name: str, config: dict, layout: str, tmp_path: Path) -> None:
    model = make_hf(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if layout == "shards" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == (layout == "shards")
    if layout in ("pickle", "old"):
        state = model.state_dict()
        if layout == "old":
            N = model.config.vision_config.image_size // 8
            count = N * N + (name == "CLIPModel")
            state["vision_model.embeddings.position_ids"] = torch.arange(count)[None]
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    write_tokenizer(tmp_path)
    clip = load_clip(str(tmp_path))
    agree(clip.tower, hf_feature(model), (32, 32))
    assert clip.preprocess.mode == ("shortest" if name == "CLIPModel" else "squash")
    assert clip.preprocess.interpolation == ("bicubic" if name == "CLIPModel" else "bilinear")

    tokenizer = clip.text.tokenizer
    length = model.config.text_config.max_position_embeddings
    inputs = tokenizer(["a cat", "a red fox"], padding="max_length", max_length=length, return_tensors="pt")
    with torch.no_grad():
        found = model.get_text_features(input_ids=inputs["input_ids"])
    expected_BD = F.normalize(getattr(found, "pooler_output", found), dim=-1)
    torch.testing.assert_close(clip.text(["a cat", "a red fox"]), expected_BD, rtol=0, atol=1e-5)
    assert clip.text.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    assert class_matrix(clip, DATASET)[0].shape == (expected_BD.shape[1], 3)


@pytest.mark.parametrize("where", ["folder", "own.safetensors"])
def test_saved_clip_comes_back(where: str, images: torch.Tensor, tmp_path: Path) -> None:
    tower, text_tower = make_tower(num_prefix=3), make_text_tower()
    path = tmp_path / where
    save_clip(path, tower, text_tower, PREPROCESS, 17.5, name="mine", dtype=torch.float32, recipe={"steps": 3})
    clip = load_clip(str(path))
    torch.testing.assert_close(clip.tower(images), tower(images), rtol=0, atol=0)
    assert (clip.model_name, clip.preprocess, clip.text.logit_scale) == ("mine", PREPROCESS, 17.5)
    assert clip.weights_hash == weights_hash(tower) and clip.tower.config == tower.config
    assert clip.text.tower.config == text_tower.config
    weight_DY, _ = class_matrix(clip, DATASET)
    torch.testing.assert_close(weight_DY.norm(dim=0), torch.ones(3))


def test_saved_clip_is_small_and_float32_when_loaded(tmp_path: Path) -> None:
    tower = make_tower()
    for path in (tmp_path / "a", tmp_path / "b"):
        save_clip(path, tower, make_text_tower(), PREPROCESS, 10.0, name="mine")
    assert {tensor.dtype for tensor in load_file(tmp_path / "a" / "clip.safetensors").values()} == {torch.float16}
    assert (tmp_path / "a" / "clip.safetensors").read_bytes() == (tmp_path / "b" / "clip.safetensors").read_bytes()
    clip = load_clip(str(tmp_path / "a"))
    assert {parameter.dtype for parameter in clip.tower.parameters()} == {torch.float32}
    torch.testing.assert_close(clip.tower.proj.weight, tower.proj.weight, rtol=1e-3, atol=1e-4)


def test_hash_follows_names_shapes_and_values() -> None:
    tower = make_tower()
    first = weights_hash(tower)
    assert first == weights_hash(make_tower()) and len(first) == 64
    tower.blocks[3].fc2.bias[0] += 1e-6
    assert weights_hash(tower) != first


@pytest.mark.assets
def test_real_weights_equal_timm(assets: Path) -> None:
    path = assets / "weights" / "vit_tiny_patch16_224_tiny-imagenet.safetensors"
    clip = load_clip("vit_tiny_patch16_224", str(path))
    assert load_clip(str(path)).weights_hash == clip.weights_hash
    assert (clip.preprocess.resize, clip.preprocess.mean) == (256, (0.5, 0.5, 0.5))
    model = timm.create_model("vit_tiny_patch16_224", num_classes=200).eval()
    model.load_state_dict(load_file(path))
    agree(clip.tower, lambda image: model.forward_head(model.forward_features(image), pre_logits=True), (224, 224), 2)
    dataset = SimpleNamespace(name="tiny-imagenet", class_names=[str(index) for index in range(200)], templates=("{}",))
    weight_DY, bias_Y = class_matrix(clip, dataset)
    agree(lambda image: clip.tower(image) @ weight_DY + bias_Y, model, (224, 224), 2)
