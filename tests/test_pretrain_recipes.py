"""Every recipe: what enters the tower, what it costs, that it learns, and that its paper setting is there."""

import inspect
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from pretrain_pairs import tiny, write_pairs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import patchrank.linear
from patchrank.errors import UserError
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.cost import as_lines, cost_table, num_tokens, recipe_macs, text_macs, view_macs
from patchrank.pretrain.draws import generator
from patchrank.pretrain.evaluate import image_features
from patchrank.pretrain.loop import open_run, train_step
from patchrank.pretrain.maskers import MASKERS, MaskSpec
from patchrank.pretrain.masking.pgs import PgsMasker
from patchrank.pretrain.objectives import OBJECTIVES, Encoded, caption_ids
from patchrank.pretrain.recipes import FULL, RECIPES
from patchrank.pretrain.rules import check
from patchrank.text_encoders import OwnText

pytestmark = pytest.mark.usefixtures("one_thread")
SCRATCH = [name for name in RECIPES if name != "lit"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def in_batch_retrieval(run) -> float:
    """Mean of both directions, all patches seen."""
    run.pair.eval()
    feature_nD, numbers = image_features(run.pair, run.batches.pictures, run.preprocess, 32)
    texts = [run.batches.dataset.images[number].captions[0] for number in numbers]
    similarity = feature_nD @ OwnText(deepcopy(run.pair.text), 1.0)(texts).T
    run.pair.train()
    own = torch.arange(len(numbers))
    return float(((similarity.argmax(1) == own).float().mean() + (similarity.argmax(0) == own).float().mean()) / 2)


def learns(pairs, tmp_path, recipe: str) -> None:
    run = open_run(tiny(pairs, tmp_path, recipe=recipe))
    assert in_batch_retrieval(run) < 0.5
    for step in range(200):
        train_step(run, step)
        if step % 10 == 9 and in_batch_retrieval(run) == 1.0:
            return
    pytest.fail(f"{recipe}: in-batch retrieval {in_batch_retrieval(run):.2f} after 200 steps")


@pytest.mark.parametrize("recipe", ["flip50_fold", "maskclip"])
def test_32_pairs_are_told_apart(pairs, tmp_path, recipe):
    learns(pairs, tmp_path, recipe)


@pytest.mark.system
@pytest.mark.parametrize("recipe", SCRATCH)
def test_every_recipe_tells_32_pairs_apart(pairs, tmp_path, recipe):
    learns(pairs, tmp_path, recipe)


def test_lit_trains_the_text_tower_only(pairs, tmp_path):
    run = open_run(tiny(pairs, tmp_path, recipe="lit", lr=3e-3, context=24))
    tower = {name: tensor.clone() for name, tensor in run.pair.tower.state_dict().items()}
    text = run.pair.text.proj.weight.clone()
    losses = [train_step(run, step)["loss"] for step in range(30)]
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(tower[name], tensor) for name, tensor in run.pair.tower.state_dict().items())
    assert not torch.equal(text, run.pair.text.proj.weight)
    assert len(list((tmp_path / "features").iterdir())) == 1 and run.batches.at(0).feature_BD.shape == (32, 64)


def entering(run, step: int) -> list[int]:
    """Tokens that enter block 0 of the online tower in one step, one number a pass."""
    seen = []
    hook = run.pair.tower.blocks[0].norm1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    run.batches.config = replace(run.config, batch_size=4)
    views = run.learner.recipe.views_at(step, 10, 0.0, 1.0, 0.1)
    run.learner(run.batches.at(0), views, 0.0, generator(0, "mask", 0))
    hook.remove()
    return seen


@pytest.mark.parametrize("recipe", SCRATCH)
def test_masks_are_on_in_the_main_part_and_off_in_tuning(pairs, tmp_path, recipe):
    run = open_run(tiny(pairs, tmp_path, recipe=recipe))
    spec = RECIPES[recipe].views[0].mask
    masked = [view.mask.num_kept((4, 4)) + 1 for view in RECIPES[recipe].views]
    extra = {"maskclip": [5], "maskclip_mlm": [5]}.get(recipe, [])
    # a fold asks block 0 for its keys first
    found = [num for num in entering(run, 0) if not (spec.rest == "fold" and num == 17)]
    assert found == masked + extra
    assert entering(run, 9) == [17] * len(masked) + extra
    assert num_tokens(run.config, RECIPES[recipe]) == sum(masked) + sum(extra)


@pytest.mark.parametrize("recipe", ["slip", "flip50_fold", "maskclip_mlm", "aclip_eff", "pgs-0.5"])
def test_predicted_macs_are_those_that_torch_counts(pairs, tmp_path, monkeypatch, recipe):
    run = open_run(tiny(pairs, tmp_path, recipe=recipe))
    batch = run.batches.at(0)
    texts = [f"{number:02d} and so on and on" for number in range(32)]
    batch = replace(batch, texts=texts, text_B=torch.arange(32), captions=[(text,) for text in texts])
    # without the fused kernels of a CPU, which the counter does not know
    monkeypatch.setattr(patchrank.linear, "_onednn_applies", lambda *_: False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run.learner(batch, RECIPES[recipe].views, 0.5, generator(0, "mask", 0))
    counted = counter.get_total_flops() / 2
    macs = recipe_macs(run.config, RECIPES[recipe])
    # similarities between pictures and texts are not part of a picture's cost: one for each view that meets the text,
    # one for the hits, four for SimCLR
    num_views = sum(view.meets_text for view in RECIPES[recipe].views)
    between = 32 * 32 * 32 * (num_views + 1 + 4 * ("simclr" in RECIPES[recipe].terms))
    assert counted == pytest.approx(32 * sum(macs) + between, rel=0.01)


def test_cost_of_vit_b_is_that_of_the_papers_frame():
    rows = {row.recipe: row for row in cost_table(PretrainConfig(setting="paper"))}
    expected = {"flip50": 0.57, "flip75": 0.37, "slip": 2.69, "aclip": 1.30, "aclip_eff": 1.08, "pgs-0.3": 0.74}
    for name, ratio in expected.items():
        assert rows[name].macs_ratio == pytest.approx(ratio, abs=0.02)
    assert rows["aclip_fast"].macs_ratio < 0.95
    assert (rows["aclip"].image_tokens, rows["pgs-0.3"].image_tokens, rows["pgs-0.5"].image_tokens) == (202, 138, 99)
    assert rows["aclip_fast"].image_tokens == 2 * 81 and rows["aclip_eff"].teacher_tokens == 50
    config = PretrainConfig(setting="paper")
    assert text_macs(config.text_config()) == pytest.approx(2.98e9, rel=0.01)
    assert view_macs(config.tower_config(), FULL).trained == pytest.approx(16.35e9, rel=0.01)
    assert any(line.startswith("> aclip_eff") for line in as_lines(list(rows.values()), "aclip_eff"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_is_whole(name):
    recipe = RECIPES[name]
    assert f"{name}," in inspect.getsource(PretrainConfig) or f"or {name}." in inspect.getsource(PretrainConfig)
    assert recipe.source and set(recipe.terms) <= set(OBJECTIVES)
    assert recipe.teacher is not None or not set(recipe.terms) & {"byol", "distill"}
    for setting in ("small", "paper"):
        config = PretrainConfig(recipe=name, setting=setting, data="flickr8k")
        check(config)
        assert config.settings()["lr"] == getattr(recipe, setting).lr


@pytest.mark.parametrize("changes", [dict(recipe="att2x50", masker="text"), dict(recipe="flip50", contrast="siglip")])
def test_ablations_train(pairs, tmp_path, changes):
    run = open_run(tiny(pairs, tmp_path, num_steps=20, tuning=0.0, **changes))
    losses = [train_step(run, step)["loss"] for step in range(20)]
    assert losses[-1] < losses[0]
    assert (run.learner.teacher is not None and run.learner.teacher.text is not None) == ("masker" in changes)
    assert set(run.learner.objectives.terms) == {changes.get("contrast", "clip")}


def test_a_given_flag_wins_over_the_setting():
    config = PretrainConfig(recipe="aclip", setting="paper", lr=0.01, tuning=0.2)
    assert (config.lr, config.tuning, config.weight_decay, config.width) == (0.01, 0.2, 0.5, 768)
    with pytest.raises(UserError, match="small or paper"):
        check(PretrainConfig(setting="large"))


def test_distinct_texts_change_nothing_but_the_work(pairs, tmp_path):
    """The loss of one process (equal texts once) is the loss that several processes compute (a text a picture)."""
    run = open_run(tiny(pairs, tmp_path))
    chance = torch.Generator().manual_seed(0)
    text_B = torch.tensor([0, 0, 1, 2, 2, 2])
    texts = ["a", "b", "c"]
    captions = [("a", "b"), ("a",), ("b",), ("c",), ("c", "a"), ("c",)]
    batch = replace(
        run.batches.at(0),
        texts=texts,
        text_B=text_B,
        captions=captions,
        count_U=torch.tensor([2.0, 1.0, 3.0]),
        positive_BU=torch.tensor([[text in own for text in texts] for own in captions]),
    )
    feature_VBD, text_UD = torch.randn(1, 6, 32, generator=chance), torch.randn(3, 32, generator=chance)
    caption_BM, drawn_B = caption_ids(captions, [texts[number] for number in text_B])
    scale = torch.tensor(5.0)
    encoded = Encoded(feature_VBD=feature_VBD, text_BD=text_UD[text_B], scale=scale, caption_BM=caption_BM,
                      drawn_B=drawn_B)  # fmt: skip
    alone = run.learner._losses(encoded, text_UD, batch)["clip"]
    run.learner.alone = False
    torch.testing.assert_close(run.learner._losses(encoded, text_UD, batch)["clip"], alone)


def test_unknown_mask_is_refused():
    with pytest.raises(UserError, match="unknown"):
        MaskSpec(masker="atentive")


def test_progress_of_the_run_reaches_the_masker(pairs, tmp_path, monkeypatch):
    seen = []

    class Spy(PgsMasker):
        def __call__(self, context):
            seen.append(context.progress)
            assert context.token_BNC.shape == (8, 16, 32) and not context.token_BNC.requires_grad
            return super().__call__(context)

    monkeypatch.setitem(MASKERS, "pgs", Spy())
    run = open_run(tiny(pairs, tmp_path, recipe="pgs-0.5", num_steps=5, num_warmup=1, batch_size=8, tuning=0.0))
    for step in (0, 2, 4):
        train_step(run, step)
    assert seen == [0.0, 0.5, 1.0]


def test_similarities_of_a_masker_are_counted_for_the_anchors_that_it_draws():
    config = PretrainConfig(recipe="pgs-0.5", data="flickr8k")
    tower, spec = config.tower_config(), MaskSpec(masker="pgs-no-transport", keep=0.5)
    found = view_macs(tower, spec).frozen - view_macs(tower, MaskSpec(masker="random", keep=0.5)).frozen
    assert found == 64 * 4 * (3 * 64 + 1 + tower.width)
