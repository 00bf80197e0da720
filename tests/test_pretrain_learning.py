"""That masks and objectives do what they are for: small towers learn with them, in seconds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patchrank.pretrain.maskers import MaskContext, MaskSpec, encode_masked, mask
from patchrank.pretrain.model import build_pair
from patchrank.pretrain.objectives import OBJECTIVES, Encoded
from patchrank.pretrain.teacher import Teacher
from patchrank.text import TextConfig
from patchrank.tower import TowerConfig, VisionTower

NUM_CLASSES, NUM_PATCHES = 16, 16
pytestmark = pytest.mark.system


def plain_tower() -> VisionTower:
    """A small tower without any hint about where to look."""
    config = TowerConfig(
        image_size=(32, 32), patch_size=8, width=32, num_layers=2, num_heads=2, mlp_width=64, output_dim=16
    )
    tower = VisionTower(config)
    for block in tower.blocks:
        for layer in (block.qkv, block.out, block.fc1, block.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    nn.init.normal_(tower.position, std=0.02)
    nn.init.normal_(tower.prefix, std=0.02)
    return tower


def one_telling_patch(num: int, chance: torch.Generator):
    """Noise in which one patch of sixteen carries the class; (picture, class, place)."""
    pattern = torch.randn(NUM_CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    label_B = torch.randint(NUM_CLASSES, (num,), generator=chance)
    place_B = torch.randint(NUM_PATCHES, (num,), generator=chance)
    image_BCHW = 0.3 * torch.randn(num, 3, 32, 32, generator=chance)
    for row, (label, place) in enumerate(zip(label_B.tolist(), place_B.tolist())):
        top, left = 8 * (place // 4), 8 * (place % 4)
        image_BCHW[row, :, top : top + 8, left : left + 8] = pattern[label]
    return image_BCHW, label_B, place_B


def learn(masker: str, num_steps: int = 80) -> tuple[float, float]:
    """Accuracy on whole pictures, and how often the telling patch was kept in the last twenty steps."""
    torch.manual_seed(0)
    chance = torch.Generator().manual_seed(1)
    tower, text, objective = plain_tower(), nn.Embedding(NUM_CLASSES, 16), OBJECTIVES["clip"]()
    teacher = Teacher(tower)
    optimiser = torch.optim.AdamW([*tower.parameters(), *text.parameters()], lr=3e-3)
    spec, kept = MaskSpec(masker=masker, keep=0.25), []
    for _ in range(num_steps):
        image_BCHW, label_B, place_B = one_telling_patch(64, chance)
        context = MaskContext(image_BCHW=image_BCHW, patch_size=8, generator=chance, teacher=teacher.look(image_BCHW))
        selection = mask(spec, context)
        kept.append(float((selection.keep_BK == place_B[:, None]).any(1).float().mean()))
        feature_BD = tower.proj(encode_masked(tower, tower.embed(image_BCHW), selection))
        loss = objective(
            Encoded(
                feature_VBD=feature_BD[None],
                text_BD=text(label_B),
                scale=torch.tensor(10.0),
                caption_BM=label_B[:, None],
                drawn_B=label_B,
            )
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        teacher.update(0.9, tower)
    image_BCHW, label_B, _ = one_telling_patch(256, chance)
    with torch.no_grad():
        cosine_BY = F.normalize(tower(image_BCHW), dim=-1) @ F.normalize(text.weight, dim=-1).T
    return float((cosine_BY.argmax(1) == label_B).float().mean()), sum(kept[-20:]) / 20


def test_attention_finds_the_patch_that_tells_and_high_loses_it():
    accuracy, kept = {}, {}
    for masker in ("random", "attentive", "attentive-high"):
        accuracy[masker], kept[masker] = learn(masker)
    assert 0.2 < kept["random"] < 0.3 and kept["attentive"] > 0.6 and kept["attentive-high"] < 0.15
    assert accuracy["attentive"] > accuracy["random"] + 0.1
    assert accuracy["attentive-high"] < accuracy["attentive"] - 0.3


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_32_pairs_are_told_apart_in_200_steps(name):
    config = TowerConfig(
        image_size=(32, 32), patch_size=8, width=32, num_layers=2, num_heads=2, mlp_width=64, output_dim=16
    )
    pair = build_pair(
        config, TextConfig(context=8, width=32, num_layers=1, num_heads=1, mlp_width=32, output_dim=16), 0
    )
    image_BCHW = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    token_BL = torch.randint(97, 123, (32, 8), generator=torch.Generator().manual_seed(3))
    token_BL[:, 0], token_BL[:, -1] = 256, 257
    objective = OBJECTIVES[name]()
    optimiser = torch.optim.AdamW([*pair.parameters(), *objective.parameters()], lr=2e-3)
    for _ in range(200):
        encoded = Encoded(
            feature_VBD=pair.tower(image_BCHW)[None], text_BD=pair.text(token_BL), scale=pair.log_scale.exp()
        )
        optimiser.zero_grad()
        objective(encoded).backward()
        optimiser.step()
        cosine_BB = F.normalize(encoded.feature_VBD[0], dim=-1) @ F.normalize(encoded.text_BD, dim=-1).T
        if (cosine_BB.argmax(1) == torch.arange(32)).all() and (cosine_BB.argmax(0) == torch.arange(32)).all():
            return
    pytest.fail("in-batch retrieval did not reach 100 %")
