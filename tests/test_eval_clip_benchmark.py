"""Our numbers beside CLIP_benchmark's own, on the same model object, images, class names, prompts: equal."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tiny_clip import save_tiny_clip
from torch import Tensor, nn

from eval import composition, retrieval, zero_shot
from eval.features import Features, FeatureStore, Method, extract
from eval.protocols import _clip_benchmark
from eval.rivals import build
from patchrank.classifier import classifier
from patchrank.data import Dataset, load_dataset
from patchrank.data.prompts import OBJECT_ENSEMBLE, PET_ENSEMBLE, TEXTURE_ENSEMBLE
from patchrank.loading import LoadedClip, load_clip
from patchrank.text import tokenize

pytest.importorskip("clip_benchmark", reason="CLIP_benchmark is not installed: pip install 'patchrank[bench]'")
CAPTIONS = (3, 5, 4, 1)


class TwoTowers(nn.Module):
    """What CLIP_benchmark asks of a model, around our image tower (dense or pruned) and our text tower."""

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.encode_image, self.encode_text = image, text


class Loader:
    """Batches of seven, as a data loader would give them."""

    def __init__(self, images: Tensor, targets: list, classes: list[str]) -> None:
        self.images, self.targets, self.dataset = images, targets, self
        self.classes = classes

    def __iter__(self) -> Iterator:
        for start in range(0, len(self.images), 7):
            targets = self.targets[start : start + 7]
            whole = torch.tensor(targets) if isinstance(targets[0], int) else targets
            yield self.images[start : start + 7], whole


@pytest.fixture(autouse=True)
def with_present_numpy(monkeypatch):
    """CLIP_benchmark 1.6 calls `float` on arrays of one element, which NumPy 2.4 refuses; nothing else changes."""
    from clip_benchmark.metrics import zeroshot_classification

    number = lambda value: value.item() if hasattr(value, "item") else float(value)  # noqa: E731
    monkeypatch.setattr(zeroshot_classification, "float", number, raising=False)


def check_all(clip: LoadedClip, dataset: Dataset, names: tuple[str, ...]) -> None:
    """Zero-shot, retrieval and composition of dense and pruned towers, ours against theirs."""
    from clip_benchmark.metrics import image_caption_selection, zeroshot_classification, zeroshot_retrieval

    towers = {"dense": clip.tower} | {name: build(name, clip.tower, 0.6).eval() for name in names}
    methods = [Method(name=name, module=tower, image_macs=1) for name, tower in towers.items()]
    found = dict(zip(towers, extract(clip, dataset, dataset.images, methods, FeatureStore(None))))
    images = torch.stack([clip.preprocess(dataset.open(item.id)) for item in dataset.images])
    tokenizer = lambda texts: tokenize(texts, clip.text.tower.config.context)  # noqa: E731
    captions = [
        [f"{text} number {place} of {extra}" for extra, text in enumerate((item.captions * 2)[: CAPTIONS[place % 4]])]
        for place, item in enumerate(dataset.images)
    ]
    pairs = [list(item.captions[1:3]) for item in dataset.images]
    labels, classes = [item.label for item in dataset.images], dataset.class_names
    for name, tower in towers.items():
        model, ours = TwoTowers(tower, clip.text.tower), found[name]
        theirs = zeroshot_classification.evaluate(
            model, Loader(images, labels, classes), tokenizer, classes,
            [template.replace("{}", "{c}") for template in dataset.templates], "cpu", amp=False,
        )  # fmt: skip
        assert theirs == pytest.approx(
            agreeing(zero_shot.judge(ours, found["dense"], classifier(clip, dataset)), theirs)
        )
        theirs = zeroshot_retrieval.evaluate(
            model, Loader(images, captions, []), tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
        )
        text_TD = clip.text([caption for row in captions for caption in row])
        outcome = retrieval.judge(with_captions(ours, captions), found["dense"], text_TD, (1, 5, 10))
        assert theirs == pytest.approx(agreeing(outcome, theirs))
        theirs = image_caption_selection.evaluate(model, Loader(images, pairs, []), tokenizer, "cpu", amp=False)
        text_I2D = clip.text([caption for row in pairs for caption in row]).unflatten(0, (-1, 2))
        outcome = composition.judge(with_captions(ours, pairs), found["dense"], text_I2D)
        assert {name: theirs[name] for name in ("acc", "text_acc")} == pytest.approx(
            {name: outcome.metrics[name] for name in ("acc", "text_acc")}
        )


def agreeing(outcome, theirs: dict) -> dict:
    """Our values of their metrics; all of them must be there."""
    return {name: outcome.metrics[name] for name in theirs}


def with_captions(found: Features, captions: list[list[str]]) -> Features:
    items = [replace(item, captions=tuple(texts)) for item, texts in zip(found.items, captions)]
    return replace(found, items=items)


def test_equal_on_a_small_model(tmp_path):
    dataset = load_dataset("digits", split="val").with_ensemble()
    clip = load_clip(str(save_tiny_clip(tmp_path / "tiny")))
    check_all(clip, replace(dataset, images=dataset.images[:33]), ("tome",))


@pytest.mark.system
def test_equal_on_the_embedded_model():
    dataset = load_dataset("digits")
    check_all(load_clip("embedded"), replace(dataset, images=dataset.images[:200]), ("ours", "evit"))


@pytest.mark.parametrize(
    ("name", "prompts"), [("caltech101", OBJECT_ENSEMBLE), ("pets", PET_ENSEMBLE), ("dtd", TEXTURE_ENSEMBLE)]
)
def test_our_ensembles_are_those_of_clip_benchmark(name, prompts):
    theirs = _clip_benchmark("en_zeroshot_classification_templates.json")[name]
    assert sorted(one.replace("{c}", "{}") for one in theirs) == sorted(prompts)
