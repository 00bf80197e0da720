"""The byte-level text tower: tokens, padding, pooling."""

import pytest
import torch

from patchrank.errors import UserError
from patchrank.text import END, PAD, START, TextConfig, TextTower, tokenize
from patchrank.text_encoders import OwnText

CONFIG = TextConfig(context=16, width=32, num_layers=2, num_heads=4, mlp_width=64, output_dim=24)


def make_text_tower(seed: int = 0, config: TextConfig = CONFIG) -> TextTower:
    torch.manual_seed(seed)
    tower = TextTower(config)
    for parameter in tower.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return tower.eval().requires_grad_(False)


def test_tokenize_pads_short_texts_and_cuts_long_ones() -> None:
    token_BL = tokenize(["ab", "é", "", "0123456789"], 8)
    assert token_BL.dtype == torch.int64
    assert token_BL.tolist() == [
        [START, 97, 98, END, PAD, PAD, PAD, PAD],
        [START, 0xC3, 0xA9, END, PAD, PAD, PAD, PAD],
        [START, END, PAD, PAD, PAD, PAD, PAD, PAD],
        [START, 48, 49, 50, 51, 52, 53, END],
    ]


@pytest.mark.parametrize(("texts", "context"), [(["a"], 2), ([], 8)])
def test_tokenize_refuses(texts: list[str], context: int) -> None:
    with pytest.raises(UserError):
        tokenize(texts, context)


def test_padding_changes_nothing_and_every_byte_counts() -> None:
    tower = make_text_tower()
    short_BD = tower(tokenize(["seven"], 7))
    torch.testing.assert_close(tower(tokenize(["seven"], 16)), short_BD, rtol=0, atol=1e-5)
    assert (tower(tokenize(["sevem"], 16)) - short_BD).abs().max() > 1e-2
    assert (tower(tokenize(["neves"], 16)) - short_BD).abs().max() > 1e-2


def test_gradients_reach_every_parameter() -> None:
    tower = make_text_tower().train().requires_grad_(True)
    tower(tokenize(["a digit", "another digit"], 16)).square().sum().backward()
    silent = [name for name, parameter in tower.named_parameters() if parameter.grad is None]
    assert not silent


def test_encoder_gives_unit_rows_whatever_the_batch() -> None:
    encode = OwnText(make_text_tower(), 20.0)
    texts = [f"text {index}" for index in range(300)]
    found_BD = encode(texts)
    assert found_BD.shape == (300, 24) and found_BD.dtype == torch.float32
    torch.testing.assert_close(found_BD.norm(dim=-1), torch.ones(300))
    torch.testing.assert_close(found_BD[256:258], encode(texts[256:258]), rtol=0, atol=1e-5)
    with pytest.raises(UserError):
        encode([])
