"""What `load_clip` refuses: each time one line with the value, the rule and the remedy."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tower
from safetensors.torch import save_file
from test_loading import CLIP_PROCESSOR, OPEN_CLIP, PREPROCESS, make_hf, shuffle
from test_text import make_text_tower

from patchrank.errors import UserError
from patchrank.loading import LoadedClip, class_matrix, load_clip, save_clip
from patchrank.torchvision_shim import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: E402
import timm  # noqa: E402


def refused(*words: str):
    """One line that holds all these words."""
    pattern = "(?s)" + "".join(f"(?=.*{word})" for word in words) + r"\A[^\n]*\Z"
    return pytest.raises(UserError, match=pattern)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return timm.create_model("test_vit", num_classes=3).state_dict()


def test_every_key_of_a_timm_file_must_fit(state: dict, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    changes = {
        "missing": {name: tensor for name, tensor in state.items() if name != "blocks.1.mlp.fc2.bias"},
        "unknown": state | {"blocks.0.attn.q_norm.weight": torch.ones(3)},
        "shape": state | {"pos_embed": torch.zeros(1, 5, state["pos_embed"].shape[2])},
    }
    keys = {"missing": "blocks.1.mlp.fc2.bias", "unknown": "blocks.0.attn.q_norm.weight", "shape": "pos_embed"}
    for fault, changed in changes.items():
        save_file(changed, path)
        with refused(fault, keys[fault], "weights.safetensors"):
            load_clip("test_vit", str(path))
    save_file({name: tensor for name, tensor in state.items() if name != "head.bias"}, path)
    with refused("missing", "head.bias"):
        load_clip("test_vit", str(path))


def test_every_key_of_an_open_clip_file_must_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", OPEN_CLIP)
    state = open_clip.create_model("tiny-clip", load_weights=False).state_dict()
    path = tmp_path / "weights.safetensors"
    for name in ("visual.proj", "transformer.resblocks.0.ln_1.bias"):
        save_file({key: tensor for key, tensor in state.items() if key != name}, path)
        with refused("missing", name):
            load_clip("tiny-clip", str(path))
    save_file(state | {"visual.extra": torch.zeros(1)}, path)
    with refused("unknown", "visual.extra"):
        load_clip("tiny-clip", str(path))


@pytest.mark.parametrize(
    ("fault", "key"),
    [
        ("missing", "vision_model.encoder.layers.2.layer_norm2.bias"),
        ("missing", "visual_projection.weight"),
        ("missing", "text_model.final_layer_norm.bias"),
        ("unknown", "vision_model.extra"),
        ("unexpected", "text_model.extra"),
    ],
)
def test_every_key_of_a_hugging_face_folder_must_fit(fault: str, key: str, tmp_path: Path) -> None:
    model = make_hf("CLIPModel")
    model.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != key}
    if fault != "missing":
        state[key] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP_PROCESSOR))
    with refused(fault, key):
        load_clip(str(tmp_path))


def test_names_nobody_knows_list_the_closest(state: dict, tmp_path: Path) -> None:
    with refused("ViT-B-23", "ViT-B-32", "list_models"):
        load_clip("ViT-B-23")
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    with refused("vit_tiny_patch61_224", "vit_tiny_patch16_224"):
        load_clip(f"timm:vit_tiny_patch61_224@{path}")
    with refused("ViT-B-32", "laion2b_s34b_b79k", "--pretrained"):
        load_clip("ViT-B-32")
    with refused("nonsense", "laion2b_s34b_b79k"):
        load_clip("ViT-B-32", "nonsense")
    with refused("quick GELU", "ViT-B-32-quickgelu"):
        load_clip("ViT-B-32", "openai")
    with refused("vit_tiny_patch16_224", "--pretrained"):
        load_clip("vit_tiny_patch16_224")


def test_towers_that_are_not_supported_are_refused_by_name(state: dict, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    with refused("resnet18", "not supported", "ResNet"):
        load_clip("timm:resnet18", str(path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    save_file(state, tmp_path / "model.safetensors")
    with refused("siglip2", "NaFlex"):
        load_clip(str(tmp_path))


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self):
        return Path("unpickled").touch, ()


def test_pickled_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Evil()}, "new.pt")
    Path("old.pt").write_bytes(pickle.dumps({"weight": Evil()}))
    for name in ("new.pt", "old.pt"):
        with refused(name, "tensors only"):
            load_clip("test_vit", name)
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x00" * 100])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_broken_files(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with refused("broken", "state dict"):
        load_clip("test_vit", str(path))


def test_folders_and_files_that_lack_something(tmp_path: Path) -> None:
    with refused("config.json"):
        load_clip(str(tmp_path))
    model = shuffle(make_hf("CLIPVisionModelWithProjection"))
    model.save_pretrained(tmp_path)
    with refused("preprocessor_config.json"):
        load_clip(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP_PROCESSOR | {"crop_size": 64}))
    with refused("64", "32"):
        load_clip(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with refused("model.safetensors"):
        load_clip(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with refused("config.json", "JSON"):
        load_clip(str(tmp_path))


def test_saved_clips_that_changed(tmp_path: Path) -> None:
    save_clip(tmp_path, make_tower(), make_text_tower(), PREPROCESS, 10.0, name="mine")
    manifest = json.loads((tmp_path / "clip.json").read_text())
    (tmp_path / "clip.json").write_text(json.dumps(manifest | {"schema": 99}))
    with refused("99", "again"):
        load_clip(str(tmp_path))
    (tmp_path / "clip.json").write_text(json.dumps(manifest | {"sha256": "0" * 64}))
    with refused("checksum"):
        load_clip(str(tmp_path))
    manifest["tower"]["num_layers"] = 3
    (tmp_path / "clip.json").write_text(json.dumps(manifest))
    with refused("unknown", "image.blocks.3"):
        load_clip(str(tmp_path))


def test_class_matrix_needs_classes_that_fit() -> None:
    head = torch.zeros(5, 24), torch.zeros(5)
    clip = LoadedClip(
        tower=make_tower(), preprocess=PREPROCESS, model_name="m", pretrained="", weights_hash="", class_head=head
    )
    with refused("2 classes", "5"):
        class_matrix(clip, SimpleNamespace(name="two", class_names=["a", "b"], templates=("{}",)))
    with refused("class names"):
        class_matrix(clip, SimpleNamespace(name="none", class_names=[], templates=("{}",)))
    clip.class_head = None
    with refused("neither"):
        class_matrix(clip, SimpleNamespace(name="two", class_names=["a", "b"], templates=("{}",)))
