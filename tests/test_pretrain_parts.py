"""The pure parts of pretraining: objective, maskers, recipes, draws, pictures, start of the towers, curriculum."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from hypothesis import given, settings
from hypothesis import strategies as st

from patchrank.data import load_dataset
from patchrank.pretrain.batches import Batches
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.curriculum import CURRICULA, Pace
from patchrank.pretrain.draws import generator, sampler
from patchrank.pretrain.maskers import MaskSpec, encode
from patchrank.pretrain.model import build_pair
from patchrank.pretrain.objectives import contrastive_loss, distinct, positives
from patchrank.pretrain.pictures import Pictures, normalise, shift
from patchrank.pretrain.recipes import FULL, RECIPES
from patchrank.pretrain.schedule import learning_rate

CAPTIONS = [("a seven", "a red seven"), ("a seven", "a blue seven"), ("a two", "a red two"), ("a two", "a blue two")]


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def slow_loss(image_BD, captions, drawn, feature, scale):
    """The same with B x B entries, one column per drawn caption, in plain Python."""
    B = len(drawn)
    logits = [[scale * float(image_BD[i] @ feature[drawn[j]]) for j in range(B)] for i in range(B)]
    true = [[drawn[j] in captions[i] for j in range(B)] for i in range(B)]

    def direction(rows, positive):
        total = 0.0
        for row, marks in zip(rows, positive):
            denominator = math.log(sum(math.exp(value) for value in row))
            total += sum(denominator - value for value, mark in zip(row, marks) if mark) / sum(marks)
        return total / len(rows)

    return (direction(logits, true) + direction(list(zip(*logits)), list(zip(*true)))) / 2


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), min_size=1, max_size=8), st.integers(0, 99))
def test_loss_equals_slow_reference(draws, seed):
    captions = [CAPTIONS[kind] for kind, _ in draws]
    drawn = [CAPTIONS[kind][which] for kind, which in draws]
    texts, count_U = distinct(drawn)
    image_BD, text_UD = unit(len(draws), 5, seed=seed), unit(len(texts), 5, seed=seed + 1)
    found = contrastive_loss(image_BD, text_UD, positives(captions, texts), count_U, torch.tensor(3.0))
    expected = slow_loss(image_BD, captions, drawn, dict(zip(texts, text_UD)), 3.0)
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_loss_with_one_positive_each_is_clips():
    image_BD, text_BD = unit(6, 8, seed=1), unit(6, 8, seed=2)
    found = contrastive_loss(image_BD, text_BD, torch.eye(6, dtype=torch.bool), torch.ones(6), torch.tensor(10.0))
    logits = 10.0 * image_BD @ text_BD.T
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    torch.testing.assert_close(found, expected)


def test_a_caption_is_positive_for_every_picture_it_is_true_for():
    texts, count_U = distinct(["a seven", "a blue seven", "a two", "a two"])
    assert texts == ["a seven", "a blue seven", "a two"] and count_U.tolist() == [1, 1, 2]
    expected = [[True, False, False], [True, True, False], [False, False, True], [False, False, True]]
    assert positives(CAPTIONS, texts).tolist() == expected


def test_views_of_a_run():
    recipe, cheap = RECIPES["flip50"], MaskSpec(masker="contrast", keep=0.25)
    masks = [recipe.views_at(step, 10, 0.3, 0.25)[0].mask for step in range(10)]
    assert masks == [cheap] * 3 + [MaskSpec(masker="random", keep=0.5)] * 6 + [FULL]
    assert {RECIPES["clip"].views_at(step, 10, 0.0, 0.25)[0].mask for step in range(10)} == {FULL}


@given(st.integers(1, 30), st.data())
def test_sampler_visits_every_picture_at_most_once_an_epoch(num_items, data):
    batch_size = data.draw(st.integers(1, num_items))
    steps = num_items // batch_size
    epochs = [
        torch.cat([sampler(num_items, batch_size, 0, first + step) for step in range(steps)]) for first in (0, steps)
    ]
    for seen in epochs:
        assert len(seen) == steps * batch_size == len(seen.unique())
        assert int(seen.max()) < num_items


def test_draws_differ_by_seed_purpose_and_step():
    draws = [
        torch.rand(1, generator=generator(*key)).item() for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))
    ]
    assert len(set(draws)) == 4
    assert torch.rand(1, generator=generator(0, "a", 0)).item() == draws[0]


def test_learning_rate_rises_holds_and_falls():
    rates = [learning_rate(step, 100, 1.0, 10, 0.5) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and rates[:11] == sorted(rates[:11])
    assert set(rates[10:51]) == {1.0}
    assert rates[75] == pytest.approx(0.5) and rates[50:] == sorted(rates[50:], reverse=True) and rates[-1] < 0.001


def test_pictures_equal_the_transform_and_are_opened_once():
    dataset = load_dataset("digits", split="val")
    opened = []
    object.__setattr__(dataset, "read", lambda id, read=dataset.read: opened.append(id) or read(id))
    preprocess = PretrainConfig(image_size=56).preprocess()
    pictures = Pictures(dataset, preprocess)
    for _ in range(2):
        image_BCHW, good = pictures.batch([4, 0])
    assert good == [4, 0] and opened == ["val/000004", "val/000000"]
    expected = torch.stack([preprocess(dataset.open(f"val/{number:06d}")) for number in (4, 0)])
    torch.testing.assert_close(normalise(image_BCHW, preprocess), expected, rtol=0, atol=0)


def test_broken_pictures_are_left_out_and_listed():
    dataset = load_dataset("digits", split="train")

    def read(id, read=dataset.read):
        if id == "train/000003":
            raise OSError("torn")
        return read(id)

    object.__setattr__(dataset, "read", read)
    pictures = Pictures(dataset, PretrainConfig().preprocess())
    image_BCHW, good = pictures.batch([2, 3, 5])
    assert good == [2, 5] and len(image_BCHW) == 2
    assert list(pictures.broken) == [3] and "torn" in pictures.broken[3]


def test_shift_moves_each_picture_and_repeats_its_border():
    image_BCHW = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6).repeat(20, 1, 1, 1)
    moved = shift(image_BCHW, 2, torch.randint(5, (20, 2), generator=generator(0, "shift", 0)))
    assert moved.shape == image_BCHW.shape and moved.dtype == torch.uint8
    assert len({picture.numpy().tobytes() for picture in moved}) > 5
    padded = np.pad(image_BCHW[0, 0].numpy(), 2, mode="edge")
    windows = {padded[y : y + 6, x : x + 6].tobytes() for y in range(5) for x in range(5)}
    assert {picture.numpy().tobytes() for picture in moved} <= windows


def test_heads_start_by_looking_at_one_neighbour_each():
    config = PretrainConfig()
    tower = build_pair(config.tower_config(), config.text_config(), 0).tower
    block = tower.blocks[0]
    token_1LC = torch.cat([tower.prefix, tower.position]).unsqueeze(0)
    q, k, _ = block.qkv(block.norm1(token_1LC)).chunk(3, dim=-1)
    q, k = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in (q, k))
    attention_HLL = (q @ k.mT * 32**-0.5).softmax(-1)[0]
    seen = attention_HLL[:, 1 + 14 * 7 + 7, 1:].view(3, 14, 14)
    for one in seen:
        row, column = divmod(int(one.argmax()), 14)
        assert abs(row - 7) <= 1 and abs(column - 7) <= 1 and one.max() > 0.2


def test_pace_gets_harder_only_while_the_towers_keep_up():
    pace = Pace()
    for _ in range(100):
        pace = pace.after(0.5)
    assert pace.difficulty == 0.0 and pace.hits == pytest.approx(0.5, abs=0.01)
    for _ in range(400):
        pace = pace.after(1.0)
    assert pace.difficulty == 1.0


@pytest.mark.parametrize("name", sorted(CURRICULA))
def test_easier_pictures_have_true_captions_and_the_size_of_the_real_ones(name):
    dataset = load_dataset(name, split="train")
    for item in dataset.images[:10]:
        for difficulty in (0.0, 0.5, 1.0):
            picture, captions = CURRICULA[name](item, difficulty, np.random.default_rng(0))
            assert picture.size == dataset.open(item.id).size and picture.mode == "RGB"
            assert captions and set(captions) <= set(item.captions)
            assert all(dataset.class_names[item.label] in caption for caption in captions)


def test_batches_are_a_function_of_step_and_difficulty():
    config = PretrainConfig(batch_size=8)
    dataset = load_dataset("digits", split="train")
    first, second = (Batches(config, dataset, config.preprocess()) for _ in range(2))
    second.at(0, 1.0)
    for step, difficulty in ((1, 1.0), (2, 0.3)):
        a, b = first.at(step, difficulty), second.at(step, difficulty)
        assert torch.equal(a.image_BCHW, b.image_BCHW) and a.texts == b.texts
        assert a.positive_BU.any(0).all() and a.positive_BU.any(1).all() and int(a.count_U.sum()) == 8
    assert not torch.equal(first.at(1, 1.0).image_BCHW, first.at(3, 1.0).image_BCHW)


def test_make_tower_masks_at_layer_zero_only():
    tower = make_tower(pool="mean")
    image_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert encode(tower, image_BCHW, "contrast", 0.25, generator(0, "mask", 0)).shape == (2, 24)
