"""predictors/prompt*.py: learned tokens in both towers, few-shot training, the six rows of Table 5."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from made_files import make_trained
from PIL import Image
from torch import Tensor

from patchrank.checkpoints.loaded import LoadedClip
from patchrank.checkpoints.weights import weights_hash
from patchrank.data import Dataset, Item
from patchrank.errors import UserError
from patchrank.loading import class_matrix, load_clip
from patchrank.macs import dense_macs
from patchrank.preprocess import Preprocess
from patchrank.pruned import PrunedTower
from patchrank.scorers import SCORERS
from patchrank.spec import PruneSpec
from patchrank.text import TextConfig, TextTower
from patchrank.text_encoders import OpenClipText, OwnText
from patchrank.torchvision_shim import ensure_torchvision
from patchrank.tower import VisionTower
from predictors import prompt as command
from predictors.prompt import PromptConfig, check, macs_of, tune
from predictors.prompt_table import CELLS, hits, make_row, markdown
from predictors.prompt_text import PromptedClasses
from predictors.prompt_tower import Prompt, prompted_feature, with_tokens

NAMES = ("cat", "old dog", "owl")
TEMPLATE = "a photo of the {}, a pet"
HALF = (0.5, 0.5, 0.5)
SPEC = PruneSpec(cuts=((1, 0.7), (3, 0.5)), select="suppress", where="inside")


def clip_of(tower: VisionTower) -> LoadedClip:
    torch.manual_seed(0)
    text = TextTower(TextConfig(width=16, num_layers=1, num_heads=2, mlp_width=16, output_dim=24))
    preprocess = Preprocess(image_size=(32, 32), resize=32, mean=HALF, std=HALF)
    return LoadedClip(tower, preprocess, "tiny", "", weights_hash(tower), text=OwnText(text, 20.0))


@pytest.fixture
def clip() -> LoadedClip:
    return clip_of(make_tower())


def dataset(split: str) -> Dataset:
    """Pictures of three colours, each with its own shade; colour is class."""

    def read(id: str) -> Image.Image:
        _, label, number = id.split("/")
        shade = 90 + 15 * int(number)
        return Image.new("RGB", (32, 32), tuple(shade if channel == int(label) else 40 for channel in range(3)))

    items = [Item(f"{split}/{number % 3}/{number // 3}", number % 3) for number in range(18)]
    return Dataset(name="colours", split=split, images=items, class_names=list(NAMES), templates=(TEMPLATE,), read=read)


@pytest.fixture
def colours(monkeypatch) -> None:
    monkeypatch.setattr(command, "load_dataset", lambda name, root, split: dataset(split))


@pytest.fixture
def config(tmp_path: Path) -> PromptConfig:
    small = dict(shots=4, seeds=(1, 2), num_tokens=5, num_steps=6, batch_size=6, save_every=3, lr=0.02)
    return PromptConfig(limit=None, threads=1, macs=0.8, out=tmp_path / "out", **small)


# Text


def test_the_templates_own_words_as_tokens_are_the_zero_shot_classifier(clip: LoadedClip) -> None:
    before = TEMPLATE.split("{}")[0]
    classes = PromptedClasses(clip, NAMES, TEMPLATE, len(before))
    expected_DY, _ = class_matrix(clip, dataset("test"))
    torch.testing.assert_close(classes(classes.start(seed=0)), expected_DY.T, atol=1e-5, rtol=1e-4)


def test_open_clips_text_tower_takes_tokens_too(clip: LoadedClip) -> None:
    ensure_torchvision()
    import open_clip

    torch.manual_seed(0)
    vision, text = dict(layers=1, width=64, patch_size=16, image_size=32), dict(layers=1, width=32, heads=2)
    model = open_clip.model.CLIP(24, vision, text)
    clip = replace(clip, text=OpenClipText(model, "ViT-B-32", "cpu"))
    classes = PromptedClasses(clip, NAMES, TEMPLATE, 4)  # "a photo of the"
    expected_DY, _ = class_matrix(clip, dataset("test"))
    tokens = classes.start(seed=0)
    torch.testing.assert_close(classes(tokens), expected_DY.T, atol=1e-5, rtol=1e-4)
    longer = PromptedClasses(clip, NAMES, TEMPLATE, 9)
    start = longer.start(seed=0).requires_grad_()
    assert torch.equal(start[5:].detach(), tokens) and start[:5].std() < 0.05
    longer(start).square().mul(torch.arange(24.0)).sum().backward()
    assert (start.grad.abs().sum(1) > 0).all() and all(p.grad is None for p in model.parameters())


def test_tokens_reach_every_class_and_nothing_stays_behind(clip: LoadedClip) -> None:
    classes = PromptedClasses(clip, NAMES, TEMPLATE, 6)
    plain = clip.text(["a cat"])
    tokens = classes.start(seed=0).requires_grad_()
    found = classes(tokens)
    assert found.shape == (3, 24) and torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-5)
    assert not torch.allclose(found, classes(tokens + torch.randn(6, 16)), atol=1e-3)
    (found * torch.arange(24.0)).sum().backward()
    assert (tokens.grad.abs().sum(1) > 0).all()
    assert torch.equal(clip.text(["a cat"]), plain) and not clip.text.tower.token._forward_hooks


def test_tokens_must_leave_room_for_the_names(clip: LoadedClip) -> None:
    with pytest.raises(UserError, match="--num-tokens 50: with class 'old dog' longer than the 64 tokens"):
        PromptedClasses(clip, NAMES, TEMPLATE, 50)
    with pytest.raises(UserError, match="has no text tower; prompts need"):
        PromptedClasses(replace(clip, text=None), NAMES, TEMPLATE, 4)


# Image


def test_visual_tokens_stand_in_the_prefix(images: Tensor) -> None:
    tower = make_tower()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    prompt = Prompt(torch.randn(3, 16), tower.config.width, seed=0)
    torch.testing.assert_close(prompt.visual(), prompt.text_TE @ prompt.map_CE.T)
    tuned = with_tokens(tower, prompt.visual())
    x_BLC = tower.embed(images)
    visual_BTC = prompt.visual().detach().expand(3, -1, -1)
    expected = tower.finish(torch.cat([x_BLC[:, :1], visual_BTC, x_BLC[:, 1:]], dim=1), 0, num_prefix=4)
    torch.testing.assert_close(tuned(images), expected, atol=1e-5, rtol=1e-4)
    roomy = with_tokens(tower, torch.zeros(3, 32))
    torch.testing.assert_close(prompted_feature(roomy, prompt, images), expected, atol=1e-5, rtol=1e-4)
    assert macs_of(tuned) == dense_macs(tuned.config) > dense_macs(tower.config)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    with pytest.raises(ValueError, match="text tokens only"):
        Prompt(torch.randn(3, 16), None, seed=0).visual()


def test_pruned_towers_keep_visual_tokens_and_pass_gradients(images: Tensor) -> None:
    tower, scorer = make_tower(), SCORERS["random"]((4, 4))
    prompt = Prompt(torch.randn(3, 16), tower.config.width, seed=0)
    pruned = PrunedTower(with_tokens(tower, prompt.visual()), SPEC, scorer)
    state, _ = pruned.tokens(images)
    assert state.num_prefix == 4 and state.patches_BNC.shape[1] == 8
    roomy = PrunedTower(with_tokens(tower, torch.zeros(3, 32)), SPEC, scorer)
    feature = prompted_feature(roomy, prompt, images)
    torch.testing.assert_close(feature, pruned(images), atol=1e-5, rtol=1e-4)
    feature.square().sum().backward()
    assert prompt.text_TE.grad.abs().sum() > 0 and prompt.map_CE.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in [*roomy.parameters(), *tower.parameters()])


# Rows


def test_rows_hold_seeds_and_losses() -> None:
    assert [cell.name for cell in CELLS][:3] == ["dense", "pruned", "tuned dense (text)"] and len(CELLS) == 6
    dense_SI = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).float()
    pruned_SI = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).float()
    row = make_row(CELLS[3], pruned_SI, 70, 100, dense_SI)
    assert row.acc1 == 0.375 and row.acc1_seeds == [0.5, 0.25] and row.macs_share == 0.7
    assert row.loss == 0.25 and row.loss_ci95[0] <= 0.25 <= row.loss_ci95[1]
    assert row.acc1_std == pytest.approx(0.1768, abs=1e-4)
    untuned = make_row(CELLS[0], dense_SI[:1], 100, 100, None)
    assert untuned.acc1_std is None and untuned.loss is None
    assert "| tuned pruned (text) | 70.0 | 37.50 | 17.68 | +25.00 |" in markdown([untuned, row], "title")
    assert hits(torch.tensor([[0.1, 0.2], [0.3, 0.1]]), torch.tensor([1, 1])).tolist() == [1.0, 0.0]


def test_six_rows_are_tuned_and_kept(clip: LoadedClip, config: PromptConfig, colours, monkeypatch) -> None:
    before = weights_hash(clip.tower)
    report = tune(config, clip)
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [cell.name for cell in CELLS] and report["num_images"] == 18
    assert all(len(rows[cell.name]["acc1_seeds"]) == (2 if cell.text else 1) for cell in CELLS)
    assert rows["tuned dense (text)"]["acc1"] > rows["dense"]["acc1"], "colours can be learned"
    assert rows["pruned"]["macs_share"] <= 0.8 < rows["tuned pruned (text + visual)"]["macs_share"] < 1.5
    assert rows["tuned dense (text + visual)"]["macs_share"] > 1
    assert weights_hash(clip.tower) == before
    assert json.loads((config.out / "prompt.json").read_text())["rows"] == json.loads(json.dumps(report["rows"]))
    by_hand = clip.tower(
        torch.stack([clip.preprocess(dataset("test").open(item.id)) for item in dataset("test").images])
    )
    answers = (F.normalize(by_hand, dim=-1) @ class_matrix(clip, dataset("test"))[0]).argmax(-1)
    share = (answers == torch.tensor([item.label for item in dataset("test").images])).float().mean().item()
    assert rows["dense"]["acc1"] == pytest.approx(share)
    monkeypatch.setattr("predictors.fit._step", None)
    again = tune(config, clip)
    assert again["rows"] == report["rows"], "a second run trains nothing and says the same"


def test_a_trained_scorer_prunes_the_tuned_tower(clip: LoadedClip, config: PromptConfig, tmp_path: Path) -> None:
    folder = make_trained(tmp_path / "trained", clip.tower)
    prune = command.pruning(replace(config, macs=None, pruned=folder), clip)
    module = prune(with_tokens(clip.tower, torch.zeros(5, 32)))
    assert isinstance(module, PrunedTower) and module.config.num_prefix == 6
    assert type(module.scorer).__name__ == "LinearScorer"
    with pytest.raises(UserError, match="must be frozen, for the weights"):
        command.pruning(replace(config, macs=None, pruned=folder), clip_of(make_tower(seed=1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data="nothing"), "--data nothing: unknown"),
        (dict(rest="merge"), "--rest merge: unknown; choose one of fold, drop"),
        (dict(shots=0), "--shots 0: must be 1 or more"),
        (dict(limit=0), "--limit 0: must be 1 or more"),
        (dict(seeds=(1, 1)), "--seeds 1 1: must be one or more different"),
        (dict(lr=0.0), "--lr 0: must be positive"),
        (dict(pruned=Path("x")), "--pruned x: brings its own cuts"),
    ],
)
def test_bad_flags_are_one_line(config: PromptConfig, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(replace(config, **changes))


@pytest.mark.system
def test_the_embedded_model_on_digits(tmp_path: Path) -> None:
    report = tune(PromptConfig(seeds=(1,), limit=100, num_steps=20, save_every=10, out=tmp_path), load_clip())
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == 6 and all(row["acc1"] > 0.5 for row in rows.values())
    assert rows["tuned pruned (text + visual)"]["macs_share"] < 0.85
