"""Cached features: equal to each method alone, computed once, checked on disk, shared between limits."""

import logging
from dataclasses import replace

import pytest
import torch
from conftest import make_tower
from tiny_clip import save_tiny_clip

from eval import features as cached
from eval.features import FeatureStore, Method, extract
from eval.rivals import TRAINING_FREE, build
from eval.shared_prefix import features, first_cut
from eval.text_cache import CachedText, with_text_cache
from patchrank.data import BrokenImage, load_dataset
from patchrank.errors import UserError
from patchrank.loading import load_clip
from patchrank.search.plan import threads

NAMES = ("ours", "tome", "drop-random")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_clip(str(save_tiny_clip(tmp_path_factory.mktemp("model") / "tiny")))


@pytest.fixture(scope="module")
def dataset():
    full = load_dataset("digits", split="val")
    return replace(full, images=full.images[:11])


@pytest.fixture
def methods(clip) -> list[Method]:
    found = [Method(name="dense", module=clip.tower, image_macs=1)]
    return found + [Method(name=name, macs=0.7, module=build(name, clip.tower, 0.7), image_macs=1) for name in NAMES]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cached, "SHARD", 4)


@torch.no_grad()
def test_shared_blocks_change_no_bit(images):
    tower = make_tower(num_layers=6)
    modules, shared = {"dense": tower}, set()
    for name in TRAINING_FREE:
        for macs in (0.85, 0.7):
            try:
                modules[f"{name} {macs}"] = build(name, tower, macs).eval()
            except UserError:
                continue
    found = features(tower, modules, images)
    assert list(found) == list(modules)
    for name, module in modules.items():
        assert torch.equal(found[name], module(images)), name
        if (first_cut(module, tower) or 0) > 0:
            shared.add(name.split()[0])
    assert shared >= {"dense", "ours-low-latency", "drop-random", "fold-farthest", "tome-3-6", "evit", "visionzip"}
    assert first_cut(build("ours", make_tower(num_layers=6), 0.7), tower) is None


def test_features_are_each_methods_own_in_order(clip, dataset, methods):
    for method, found in zip(
        methods, extract(clip, dataset, dataset.images, methods, FeatureStore(None), batch_size=3)
    ):
        assert found.items == dataset.images and found.broken == []
        for item, feature_D in zip(found.items, found.feature_ID):
            with torch.no_grad():
                expected_1D = method.module(clip.preprocess(dataset.open(item.id)).unsqueeze(0))
            torch.testing.assert_close(feature_D, expected_1D[0], atol=1e-4, rtol=1e-4)


def test_batches_side_by_side_change_no_bit(clip, dataset, methods):
    found = []
    for num in (1, 3):
        with threads(num):
            found.append(extract(clip, dataset, dataset.images, methods, FeatureStore(None), batch_size=1))
            assert torch.get_num_threads() == num
    assert all(torch.equal(one.feature_ID, other.feature_ID) for one, other in zip(*found, strict=True))


def count_images(monkeypatch) -> list[int]:
    counts: list[int] = []
    real = cached.features

    def counting(tower, modules, image_BCHW):
        counts.append(len(image_BCHW) * len(modules))
        return real(tower, modules, image_BCHW)

    monkeypatch.setattr(cached, "features", counting)
    return counts


def test_what_is_on_disk_is_not_computed(clip, dataset, methods, tmp_path, monkeypatch):
    store, counts = FeatureStore(tmp_path), count_images(monkeypatch)
    first = extract(clip, dataset, dataset.images, methods, store)
    assert sum(counts) == 44
    counts.clear()
    again = extract(clip, dataset, dataset.images, methods, store)
    assert sum(counts) == 4, "only the check of one image a method"
    assert all(torch.equal(one.feature_ID, other.feature_ID) for one, other in zip(first, again))
    counts.clear()
    extract(clip, dataset, dataset.images[:8], methods, store)
    assert sum(counts) == 4, "a smaller limit shares its whole runs"
    counts.clear()
    (more,) = extract(clip, dataset, dataset.images[:6], methods[:1], store)
    assert sum(counts) == 1 + 2 and torch.equal(more.feature_ID[:4], first[0].feature_ID[:4])


def test_damage_and_older_code_are_noticed(clip, dataset, methods, tmp_path, monkeypatch, caplog):
    store = FeatureStore(tmp_path)
    (first,) = extract(clip, dataset, dataset.images, methods[1:2], store)
    path = sorted((tmp_path / "ours").iterdir())[1]
    data = bytearray(path.read_bytes())
    data[-3] ^= 255
    path.write_bytes(bytes(data))
    with caplog.at_level(logging.WARNING):
        (again,) = extract(clip, dataset, dataset.images, methods[1:2], store)
    assert "damaged" in caplog.text and torch.equal(first.feature_ID, again.feature_ID)
    other = replace(methods[1], module=build("drop-centre", clip.tower, 0.7))
    extract(clip, dataset, dataset.images[:4], [other], store)  # and then a kill: no later run of the old code may stay
    (changed,) = extract(clip, dataset, dataset.images, [other], store)
    assert "older code" in caplog.text
    (expected,) = extract(clip, dataset, dataset.images, [other], FeatureStore(None))
    assert torch.equal(changed.feature_ID, expected.feature_ID)


def test_broken_and_repeated_pictures_keep_their_places(clip, dataset, methods, tmp_path):
    bad = {dataset.images[0].id, dataset.images[5].id, *(item.id for item in dataset.images[8:])}

    def read(id):
        if id in bad:
            raise OSError("no such picture")
        return dataset.read(id)

    broken = replace(dataset, read=read)
    items = [*dataset.images, dataset.images[2], dataset.images[5]]
    store = FeatureStore(tmp_path)
    for _ in range(2):
        found = extract(clip, broken, items, methods[:2], store, batch_size=3)
        for one in found:
            assert [item.id for item in one.items] == [item.id for item in items if item.id not in bad]
            assert one.broken == [item.id for item in items if item.id in bad]
            torch.testing.assert_close(one.feature_ID[-1], one.feature_ID[1])  # the repeated picture
    with pytest.raises(BrokenImage):
        broken.open(dataset.images[0].id)


def test_text_features_are_kept_and_checked(clip, tmp_path, caplog):
    texts, calls = [f"text {number}" for number in range(40)], []

    class Counting:
        logit_scale = 2.0

        def __call__(self, texts):
            calls.append(len(texts))
            return clip.text(texts)

    cache = CachedText(Counting(), tmp_path, "key")
    first_TD = cache(texts)
    assert torch.equal(cache(texts), first_TD) and calls == [40, 1] and cache.logit_scale == 2.0
    cache(texts[:3])
    assert calls == [40, 1, 3], "a few texts are not worth a file"
    (path,) = (tmp_path / "text").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert torch.equal(cache(texts), first_TD) and "damaged" in caplog.text
    other = CachedText(lambda texts: -clip.text(texts), tmp_path, "key")
    assert torch.equal(other(texts), -first_TD) and "older code" in caplog.text
    wrapped = with_text_cache(clip, tmp_path)
    assert (
        with_text_cache(wrapped, tmp_path) is wrapped and with_text_cache(replace(clip, text=None), None).text is None
    )
