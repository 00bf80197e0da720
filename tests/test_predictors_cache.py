"""Tokens on disk, images set aside by class, and the closed-form readout."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tower
from PIL import Image

from patchrank.data import Item, load_dataset
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess
from patchrank.pruned import PrunedTower
from patchrank.scorers import SCORERS
from patchrank.spec import PruneSpec
from predictors import cache
from predictors.cache import even, kept_tokens, part, split_items
from predictors.readout import ridge_readout, with_readout
from predictors.views import random_view, viewed

HALF = (0.5, 0.5, 0.5)
PREPROCESS = Preprocess(image_size=(32, 32), resize=32, mean=HALF, std=HALF)


def test_tokens_are_made_once_for_equal_questions(tmp_path: Path, monkeypatch) -> None:
    tower, dataset = make_tower(), load_dataset("digits", split="val")
    few = part(dataset, dataset.images[:3])
    made = kept_tokens(tmp_path, tower, few, PREPROCESS, 1)
    calls, encode = [], cache.encode
    monkeypatch.setattr(cache, "encode", lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs))
    again = kept_tokens(tmp_path, tower, few, PREPROCESS, 1)
    assert again.ids == made.ids and not calls
    for name in ("x_nLC", "feature_nD", "label_n"):
        assert torch.equal(getattr(again, name), getattr(made, name))
    kept_tokens(tmp_path, tower, few, PREPROCESS, 2)
    kept_tokens(tmp_path, make_tower(1), few, PREPROCESS, 1)
    kept_tokens(tmp_path, tower, part(dataset, dataset.images[:2]), PREPROCESS, 1)
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 4
    for path in tmp_path.iterdir():
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"cannot be read.*remove it"):
        kept_tokens(tmp_path, tower, few, PREPROCESS, 1)


def test_images_set_aside_are_as_many_of_each_class() -> None:
    items = [Item(f"{label}/{number}", label) for label in range(4) for number in range(2 + 3 * label)]
    labels = [item.label for item in even(items)]
    assert sorted(labels[:4]) == sorted(labels[4:8]) == [0, 1, 2, 3] and set(labels[8:11]) == {1, 2, 3}
    train, held_out = split_items(items, 5, 8)
    assert [item.id for item in held_out] == [item.id for item in even(items)[:8]] and len(train) == 5
    assert not {item.id for item in train} & {item.id for item in held_out}
    unlabelled = [Item(str(number)) for number in range(9)]
    assert {item.id for item in even(unlabelled)} == {item.id for item in unlabelled}


def test_a_readout_is_the_ridge_optimum_and_starts_at_the_identity() -> None:
    generator = torch.Generator().manual_seed(0)
    feature_nD = torch.randn(40, 5, generator=generator) + 1.0
    true_DD = torch.eye(5) + 0.3 * torch.randn(5, 5, generator=generator)
    dense_nD = feature_nD @ true_DD.T - 2.0
    map_DD, offset_D = ridge_readout(feature_nD, dense_nD, 1e-6)
    torch.testing.assert_close(feature_nD @ map_DD.T + offset_D, dense_nD, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ridge_readout(feature_nD, dense_nD, 1e6)[0], torch.eye(5), rtol=0, atol=1e-3)
    map_DD, offset_D = ridge_readout(feature_nD, dense_nD, 0.3)
    variance = feature_nD.double().var(0, unbiased=False).mean().item()

    def cost(map_DD) -> torch.Tensor:
        moved_nD = feature_nD @ map_DD.T
        error_nD = moved_nD - moved_nD.mean(0) - (dense_nD - dense_nD.mean(0))
        return error_nD.square().sum() / 40 + 0.3 * variance * (map_DD - torch.eye(5)).square().sum()

    for _ in range(5):
        assert cost(map_DD) < cost(map_DD + 0.01 * torch.randn(5, 5, generator=generator))


@pytest.mark.parametrize("changes", [{}, dict(output_dim=None), dict(output_bias=True)])
def test_a_folded_readout_is_the_map_behind_the_feature(changes, images) -> None:
    tower = make_tower(**changes)
    pruned = PrunedTower(tower, PruneSpec(cuts=((1, 0.5),)), SCORERS["random"](tower.config.grid))
    dim = tower.config.feature_dim
    generator = torch.Generator().manual_seed(1)
    map_DD, offset_D = torch.randn(dim, dim, generator=generator), torch.randn(dim, generator=generator)
    other = with_readout(pruned, map_DD, offset_D)
    torch.testing.assert_close(other(images), pruned(images) @ map_DD.T + offset_D, rtol=1e-4, atol=1e-4)
    assert other.config.output_bias and not any(parameter.requires_grad for parameter in other.parameters())


def test_views_are_parts_of_the_picture_and_always_the_same() -> None:
    """Each row of this picture has its own number, so a view tells which part it shows."""
    dataset = load_dataset("digits", split="val")
    few = part(dataset, dataset.images[:12])
    first, again, other = viewed(few, 0), viewed(few, 0), viewed(few, 1)
    for item in few.images:
        assert first.open(item.id).tobytes() == again.open(item.id).tobytes()
    assert any(first.open(item.id).tobytes() != other.open(item.id).tobytes() for item in few.images)
    assert first.name != other.name != few.name
    ramp = Image.fromarray(np.arange(40, dtype=np.uint8)[:, None].repeat(40, axis=1)).convert("RGB")
    for seed in range(20):
        view = np.asarray(random_view(ramp, random.Random(seed)))[..., 0]
        assert (np.diff(view[:, 0].astype(int)) == 1).all() and (view == view[:, :1]).all()
        assert view.size >= 0.45 * 1600 and max(view.shape) <= 40
