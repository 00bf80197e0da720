"""tower.py: the seams give the same numbers as the whole, and a token's size acts as that many copies of it."""

import pytest
import torch
from conftest import make_tower

from patchrank.tower import TowerConfig, VisionTower

KINDS = {
    "clip": dict(pre_norm=True, qkv_bias=True, activation="quick_gelu"),
    "class, no projection": dict(output_dim=None),
    "registers": dict(num_prefix=5, layer_scale=True, patch_bias=True),
    "mean, norm after": dict(pool="mean", norm="after_pool", num_prefix=0),
    "mean with class token": dict(pool="mean"),
    "attention": dict(pool="attention", num_prefix=0, activation="gelu_tanh", output_dim=None),
    "none": dict(norm="none", qkv_bias=False, output_bias=True),
}
close = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(params=KINDS)
def any_tower(request) -> VisionTower:
    return make_tower(**KINDS[request.param])


def test_finish_from_every_layer_equals_all_blocks_and_the_head(any_tower, images) -> None:
    x_BLC = any_tower.embed(images)
    whole = any_tower.head(any_tower.run(x_BLC, 0, 4))
    for start in range(5):
        torch.testing.assert_close(any_tower.finish(any_tower.run(x_BLC, 0, start), start), whole, **close)
    torch.testing.assert_close(any_tower(images), whole, **close)


def test_shapes_and_counts(any_tower, images) -> None:
    config = any_tower.config
    assert any_tower.embed(images).shape == (3, config.num_prefix + 16, 32)
    assert any_tower(images).shape == (3, config.feature_dim)
    assert config.grid == (4, 4) and config.num_patches == 16


def test_a_batch_is_its_images_one_by_one(any_tower, images) -> None:
    torch.testing.assert_close(any_tower(images), torch.cat([any_tower(image[None]) for image in images]), **close)


def test_size_two_is_the_same_as_two_copies(any_tower, images) -> None:
    """Attention, pooling and the last block's one row must all count a token of size 2 twice."""
    x_BLC = any_tower.run(any_tower.embed(images), 0, 2)
    twice_BLC = torch.cat([x_BLC, x_BLC[:, -1:]], dim=1)
    size_BL = torch.ones(x_BLC.shape[:2])
    size_BL[:, -1] = 2
    torch.testing.assert_close(any_tower.finish(x_BLC, 2, size_BL), any_tower.finish(twice_BLC, 2), **close)
    assert not torch.allclose(any_tower.finish(x_BLC, 2), any_tower.finish(twice_BLC, 2), **close)


def test_rows_of_attention_equal_the_full_attention(any_tower, images) -> None:
    x_BLC, block = any_tower.embed(images), any_tower.blocks[1]
    bias = torch.rand(3, 1, 1, x_BLC.shape[1])
    full_BLC, key_BLC = block.attend(x_BLC, bias)
    for num_rows in (1, 3):
        torch.testing.assert_close(block.attend_rows(x_BLC, num_rows, bias), full_BLC[:, :num_rows], **close)
    torch.testing.assert_close(block.keys(x_BLC), key_BLC, **close)
    torch.testing.assert_close(block.mean_head(key_BLC), key_BLC.view(3, -1, 4, 8).mean(2), **close)


def test_class_attention_is_the_first_row_of_the_softmax(tower, images) -> None:
    x_BLC, block = tower.embed(images), tower.blocks[2]
    q, k, _ = block.qkv(block.norm1(x_BLC)).view(3, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
    weight_BHLL = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1)
    torch.testing.assert_close(block.class_attention(x_BLC, 1), weight_BHLL.mean(1)[:, 0, 1:], **close)


def test_attention_equals_the_formula(tower, images) -> None:
    x_BLC, block = tower.embed(images), tower.blocks[0]
    q, k, v = block.qkv(block.norm1(x_BLC)).view(3, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
    mixed = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1) @ v
    expected = x_BLC + block.out(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(block.attend(x_BLC)[0], expected, **close)


def test_added_prefix_tokens_are_left_out_of_the_mean() -> None:
    tower = make_tower(pool="mean", norm="none")
    x_BLC = torch.randn(2, 1 + 3 + 16, 32)
    torch.testing.assert_close(tower.head(x_BLC, num_prefix=4), tower.proj(x_BLC[:, 4:].mean(1)), **close)


def test_rectangular_images_have_rows_before_columns() -> None:
    config = TowerConfig(image_size=(16, 32), patch_size=8, width=8, num_layers=1, num_heads=1, mlp_width=8)
    tower = VisionTower(config).requires_grad_(False)
    image = torch.zeros(1, 3, 16, 32)
    image[0, :, 8:16, 16:24] = 1.0
    changed = (tower.embed(image) - tower.embed(torch.zeros_like(image))).abs().sum(-1)[0, 1:]
    assert config.grid == (2, 4)
    assert changed.nonzero().flatten().tolist() == [1 * 4 + 2]
