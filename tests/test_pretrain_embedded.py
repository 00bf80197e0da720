"""The model inside the package: its size, its accuracy, and that the documented command's defaults are its recipe."""

import json
from importlib.resources import files

import pytest
import torch

from patchrank.classifier import classifier
from patchrank.data import batches, load_dataset
from patchrank.loading import load_clip
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.draws import generator
from patchrank.pretrain.maskers import encode

WEIGHTS = files("patchrank") / "assets" / "embedded.safetensors"
pytestmark = pytest.mark.skipif(not WEIGHTS.is_file(), reason="the embedded model is absent: patchrank/assets is empty")


@pytest.fixture(scope="module")
def recipe():
    return json.loads((files("patchrank") / "assets" / "embedded.json").read_text())["recipe"]


def accuracy(keep: float, num_images: int = 100) -> float:
    clip, dataset = load_clip("embedded"), load_dataset("digits", split="test")
    _, image_BCHW, label_B = next(batches(dataset, clip.preprocess, num_images))
    with torch.no_grad():
        feature_BD = encode(clip.tower, image_BCHW, "random", keep, generator(0, "mask", 0))
    return float((classifier(clip, dataset)(feature_BD).argmax(1) == label_B).float().mean())


def test_it_reads_digits_and_loses_them_without_patches(recipe):
    dense = accuracy(1.0)
    # three standard errors of 100 images around what the recipe says of all 2,000
    assert abs(dense - recipe["accuracy"]["test"]) < 3 * (0.25 / 100) ** 0.5
    assert dense > 0.75
    assert accuracy(0.25) < dense - 0.1


def test_defaults_of_the_documented_command_are_its_recipe(recipe):
    found = PretrainConfig().settings()
    assert {name: found[name] for name in recipe["settings"]} == recipe["settings"]
    # what came later is at the values that the embedded model was made with
    later = {name: value for name, value in found.items() if name not in recipe["settings"]}
    assert later | {"model": "", "head_width": 0, "head_out": 0} == {
        "setting": "small", "masker": None, "contrast": "clip", "model": "",
        "pretrained": "", "precision": "float32", "accumulate": 1, "lr_end": 0.0,
        "beta2": 0.98, "epsilon": 1e-8, "max_norm": 1.0, "tuning": 0.0, "least_area": 1.0, "text_head": 32,
        "frozen_patches": False, "start": "local", "head_width": 0, "head_out": 0,
        "num_merges": 0, "text_pool": "end", "threshold": None, "word_drop": 0.0,
        "weights": [], "gather_grad": None, "least": None,
    }  # fmt: skip
    assert recipe["command"].startswith("python -m patchrank.pretrain --recipe clip --data digits")
    assert "--num-steps" not in recipe["command"] and "--lr" not in recipe["command"]


def test_it_is_small_and_says_what_it_is(recipe):
    assert len(WEIGHTS.read_bytes()) <= 5 << 20
    for word in ("Data:", "Recipe:", "Cost:", "accuracy", "Limits:"):
        assert word in recipe["card"]
