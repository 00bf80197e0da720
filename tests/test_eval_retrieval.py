"""`python -m eval retrieval` and `composition`: recall with several captions, questions with two."""

from dataclasses import replace

import pytest
import torch

from eval import composition, retrieval
from eval.composition import CompositionConfig, kind_means
from eval.features import Features
from eval.records import read_records, read_sides
from eval.retrieval import RetrievalConfig, hits_at_k, judge, main
from patchrank.data import load_dataset
from patchrank.data.dataset import Item
from patchrank.errors import UserError
from patchrank.metrics import recall_at_k


@pytest.fixture
def shared(model, tmp_path) -> dict:
    return dict(model=str(model), limit=15, threads=1, cache=tmp_path / "cache", out=tmp_path / "out")


def features(feature_ID: torch.Tensor, captions: list[int]) -> Features:
    items = [Item(str(place), None, tuple(f"{place} {n}" for n in range(num))) for place, num in enumerate(captions)]
    return Features(feature_ID=feature_ID, items=items, broken=[])


def test_recall_by_hand():
    """Three pictures with 2, 1 and 2 captions on the axes of a plane."""
    images = features(torch.tensor([[3.0, 0], [0, 2.0], [-1.0, 0]]), [2, 1, 2])
    text_TD = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0], [-1.0, 0], [-0.6, 0.8]])
    found = judge(images, images, text_TD, (1, 2))
    # Caption 1 finds picture 1, caption 2 picture 0, caption 4 picture 1 and then its own.
    assert found.metrics["image_retrieval_recall@1"] == pytest.approx(2 / 5)
    assert found.metrics["image_retrieval_recall@2"] == pytest.approx(5 / 5)
    # Picture 0 sees captions 0 and 2 first (a tie, lowest index), picture 1 caption 1, picture 2 caption 3.
    assert found.metrics["text_retrieval_recall@1"] == pytest.approx(2 / 3)
    assert found.sides["image_retrieval_recall@1"].tolist() == [0.5, 0.0, 0.5]
    assert found.sides["text_retrieval_recall@1"].tolist() == [True, False, True]
    assert found.main_metric == "image_retrieval_recall@1" and found.metrics["cosine"] == pytest.approx(1.0)


def test_hits_are_recall_at_k_in_any_chunk(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    similarity_QG = torch.randint(0, 4, (23, 11), generator=generator).float()
    match_QG = torch.rand(23, 11, generator=generator) < 0.2
    monkeypatch.setattr(retrieval, "_CHUNK", 7)
    for k, hits_Q in hits_at_k(similarity_QG, match_QG, (1, 3, 11)).items():
        assert hits_Q.double().mean().item() == pytest.approx(recall_at_k(similarity_QG, match_QG, k))


def test_retrieval_end_to_end(shared, capsys):
    config = RetrievalConfig(**shared)
    main(config)
    records = read_records(config.out)
    assert [record.method for record in records] == ["dense", "ours"]
    for record in records:
        sides = read_sides(config.out, record)
        assert len(sides["ids"]) == 15
        for k in (1, 5, 10):
            for name in (f"image_retrieval_recall@{k}", f"text_retrieval_recall@{k}"):
                # Every canvas has four captions, so the mean over images is the mean over captions.
                assert record.metrics[name] == pytest.approx(sides[name].mean(), abs=1e-6)
        assert record.main_metric == "image_retrieval_recall@5" and record.task == "zeroshot_retrieval"
    assert "image_retrieval_recall@5 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recall": (16,)}, "--recall 16: must be 1 to 15"),
        ({"recall": ()}, "names no k"),
        ({"data": "digits-pairs"}, "split 'test' of digits-pairs"),
    ],
)
def test_mistakes_of_retrieval_are_named(shared, changes, message):
    with pytest.raises(UserError, match=message):
        main(replace(RetrievalConfig(**shared), **changes))


def test_composition_end_to_end(shared, capsys):
    config = CompositionConfig(**shared, methods=("tome",))
    composition.main(config)
    records = read_records(config.out)
    assert {record.split for record in records} == {"replace_obj", "replace_att", "replace_rel"}
    for record in records:
        sides = read_sides(config.out, record)
        assert record.metrics["acc"] == record.metrics["text_acc"] == pytest.approx(sides["correct"].mean())
    means = kind_means(records)
    dense = {record.split: record.main for record in records if record.method == "dense"}
    assert means["dense", 1.0]["objects"] == dense["replace_obj"]
    assert means["dense", 1.0]["all"] == pytest.approx(sum(dense.values()) / 3)
    assert "relations" in capsys.readouterr().out
    with pytest.raises(UserError, match="split 'swap_obj'"):
        composition.main(replace(config, categories=("swap_obj",)))
    with pytest.raises(UserError, match="unknown"):
        composition.main(replace(config, data="winoground"))


def test_the_nearer_caption_wins_and_a_tie_is_right():
    images = features(torch.tensor([[2.0, 0], [0, 1.0], [1.0, 1.0]]), [2, 2, 2])
    text_I2D = torch.tensor([[[1.0, 0], [0, 1.0]], [[1.0, 0], [0, 1.0]], [[1.0, 0], [0, 1.0]]])
    assert composition.judge(images, images, text_I2D).sides["correct"].tolist() == [True, False, True]


@pytest.mark.parametrize("category", ["replace_obj", "replace_att", "replace_rel"])
def test_wrong_captions_differ_in_one_word(category):
    right = {item.id: item.captions for item in load_dataset("digits").images}
    for item in load_dataset("digits-pairs", split=category).images[:50]:
        first, second = (caption.split() for caption in item.captions)
        assert item.captions[0] in right[item.id]
        assert sum(one != other for one, other in zip(first, second)) == 1 and len(first) == len(second)
