"""Protocols on real images: CLIP_benchmark's class names fit the labels, and a real ViT-Ti answers by its head."""

import pytest

from eval.measuring import open_bench
from eval.protocols import load_for
from eval.zero_shot import ZeroShotConfig, measure

pytestmark = pytest.mark.assets


def test_vtab_names_follow_the_labels(assets):
    pytest.importorskip("clip_benchmark", reason="CLIP_benchmark is not installed: pip install 'patchrank[bench]'")
    dataset = load_for("vtab", "caltech101", assets / "data", "test")
    assert len(dataset.images) == 6084 and len(dataset.class_names) == 102 and len(dataset.templates) == 34
    named = {item.id.split("/")[1].lower(): dataset.class_names[item.label] for item in dataset.images}
    assert named["background_google"] == "background" and named["car_side"] == "side of a car"
    others = {"faces", "faces_easy", "leopards", "motorbikes", "airplanes"} & set(named)
    same = sum(folder.replace("_", " ") == name for folder, name in named.items())
    assert others and same > 75, "most folders are named like their class"
    coop = load_for("coop", "caltech101", assets / "data", "test")
    assert len(coop.images) == 2465 and coop.templates == ("a photo of a {}.",)


@pytest.mark.system
def test_the_real_head_is_right_on_real_images(assets, tmp_path):
    config = ZeroShotConfig(
        pretrained=str(assets / "weights" / "vit_tiny_patch16_224_tiny-imagenet.safetensors"),
        model="vit_tiny_patch16_224", data="tiny-imagenet", data_root=assets / "data", split="val", limit=48,
        cache=None, out=tmp_path,
    )  # fmt: skip
    with open_bench(config) as bench:
        dense, ours = measure(config, bench, config.data)
    assert dense.protocol == ours.protocol == "head" and dense.templates_sha256 is None
    assert dense.metrics["acc1"] > 0.5 and ours.metrics["agreement"] > 0.7 and ours.metrics["cosine"] > 0.95
    assert ours.macs_share == pytest.approx(0.7, rel=0.01)
