"""Numbers of the papers and of their released code, written out here and never read from the tables that they check."""

import math

import pytest
import torch
from pretrain_pairs import tiny, write_pairs
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from patchrank.pretrain.colour import COLOURS, Colour
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.distributed import with_joined_norms
from patchrank.pretrain.learner import _terms
from patchrank.pretrain.loop import open_run, train_step
from patchrank.pretrain.recipes import RECIPES
from patchrank.pretrain.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def paper(recipe: str, **changes) -> PretrainConfig:
    return PretrainConfig(recipe=recipe, setting="paper", data="flickr8k", **changes)


def test_hyper_parameters_of_aclip_and_slip():
    aclip = paper("aclip")
    assert (aclip.lr, aclip.lr_end, aclip.weight_decay, aclip.beta2, aclip.epsilon) == (5e-4, 1e-5, 0.5, 0.98, 1e-8)
    assert (aclip.batch_size, aclip.num_steps, aclip.num_warmup, aclip.max_norm) == (4096, 89_650, 3586, None)
    assert (aclip.least_area, aclip.frozen_patches, aclip.head_width, aclip.head_out) == (0.5, True, 4096, 256)
    slip = paper("slip")
    assert (slip.lr, slip.weight_decay) == (3e-3, 0.1)
    assert _terms(slip.row, slip)["clip"][1] == {"views": (0,), "gather_grad": False}
    assert _terms(slip.row, slip)["simclr"][1]["views"] == (1, 2)
    assert [view.area for view in slip.row.views] == [None, (0.08, 1.0), (0.08, 1.0)]


def test_weights_of_the_losses():
    for recipe in ("aclip", "aclip_eff"):
        assert RECIPES[recipe].terms == {"clip": 1.0, "simclr": 1.0, "byol": 2.0}
    assert RECIPES["maskclip"].terms == {"clip": 1.0, "distill": 0.05}
    assert RECIPES["maskclip_mlm"].terms == {"clip": 1.0, "distill": 0.05, "mlm": 0.05}


@pytest.mark.parametrize(
    ("recipe", "kept"),
    [("clip", [196]), ("flip50", [98]), ("flip75", [49]), ("rand1x50", [98]), ("rand2x50", [98, 98]),
     ("att1x50", [100]), ("att2x50", [100, 100]), ("att2x50_high", [100, 100]), ("aclip", [100, 100]),
     ("aclip_eff", [100, 100]), ("aclip_fast", [80, 80]), ("pgs-0.3", [137]), ("pgs-0.5", [98]), ("eclip", [137])],
)  # fmt: skip
def test_patches_that_a_view_keeps_of_196(recipe, kept):
    """eclip: at most; half of them on average."""
    assert [view.mask.num_kept((14, 14)) for view in RECIPES[recipe].views] == kept


@pytest.mark.parametrize(
    ("recipe", "lengths"),
    [("flip50", [9]), ("flip75", [5]), ("rand2x50", [9, 9]), ("att1x50", [9]), ("att2x50_high", [9, 9]),
     ("aclip", [9, 9]), ("aclip_eff", [9, 9]), ("aclip_fast", [9, 9]), ("pgs-0.5", [9])],
)  # fmt: skip
def test_a_first_step_masks_without_being_told_to(pairs, tmp_path, recipe, lengths):
    """Regression: A-CLIP's documented command never masks. Tokens entering block 0 of 16 patches and a class token."""
    run, seen = open_run(tiny(pairs, tmp_path, recipe=recipe, tuning=None, batch_size=8)), []
    run.pair.tower.blocks[0].norm1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    train_step(run, 0)
    assert seen == lengths


def test_colours_of_aclip_s_views_and_no_flip_beside_a_teacher():
    expected = Colour(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_chance=0.8, gray_chance=0.2,
                      blur_chance=0.1, blur=(0.1, 2.0), solarize_chance=0.2, flip_chance=0.0)  # fmt: skip
    assert COLOURS["aclip"] == expected
    for recipe in RECIPES.values():
        colours = [COLOURS[view.colour] for view in recipe.views]
        assert recipe.teacher is None or not any(colour and colour.flip_chance for colour in colours)


def test_rate_warms_up_and_falls_to_its_end():
    assert learning_rate(0, 100, 1.0, 10, 1.0, 0.1) == pytest.approx(1 / 11)
    assert learning_rate(10, 100, 1.0, 10, 1.0, 0.1) == 1.0
    assert learning_rate(55, 100, 1.0, 10, 1.0, 0.1) == pytest.approx(0.55)
    assert 0.1 < learning_rate(99, 100, 1.0, 10, 1.0, 0.1) < 0.101


def test_the_optimiser_is_told_its_numbers_and_matrices_alone_decay(pairs, tmp_path):
    run = open_run(tiny(pairs, tmp_path, recipe="aclip", weight_decay=0.3, beta2=0.9, epsilon=1e-7))
    assert all(group["betas"] == (0.9, 0.9) and group["eps"] == 1e-7 for group in run.optimiser.param_groups)
    names = {id(parameter): name for name, parameter in run.learner.named_parameters()}
    decaying, others = ({names[id(one)] for one in group["params"]} for group in run.optimiser.param_groups)
    assert [group["weight_decay"] for group in run.optimiser.param_groups] == [0.3, 0.0]
    heads = {"objectives.terms.simclr.head.0.weight", "objectives.terms.byol.predictor.0.weight"}
    assert {"pair.tower.blocks.0.qkv.weight", "pair.tower.proj.weight", "pair.text.proj.weight"} | heads <= decaying
    assert {"pair.log_scale", "pair.tower.prefix", "pair.tower.position", "pair.tower.patch.weight",
            "pair.text.token.weight", "pair.text.position", "pair.tower.norm.weight"} <= others  # fmt: skip
    assert not any("bias" in name or "norm" in name or "teacher" in name for name in decaying)
    assert not any("teacher" in name for name in others)


def test_a_step_keeps_scale_and_patch_embedding_where_they_belong(pairs, tmp_path):
    run = open_run(tiny(pairs, tmp_path, recipe="aclip", frozen_patches=True, batch_size=8))
    patch = run.pair.tower.patch.weight.clone()
    for start, lowest, highest in ((10.0, math.log(100), math.log(100)), (-3.0, 0.0, 0.0)):
        with torch.no_grad():
            run.pair.log_scale.fill_(start)
        train_step(run, 0)
        assert lowest - 1e-6 <= float(run.pair.log_scale.detach()) <= highest + 1e-6
    assert torch.equal(run.pair.tower.patch.weight, patch)
    torch.testing.assert_close(run.learner.teacher.tower.model.patch.weight, patch)


def test_batch_norms_of_several_gpus_are_joined_in_the_teacher_too(pairs, tmp_path):
    learner = with_joined_norms(open_run(tiny(pairs, tmp_path, recipe="aclip")).learner)
    norms = {name: type(module) for name, module in learner.named_modules() if isinstance(module, _BatchNorm)}
    assert set(norms.values()) == {nn.SyncBatchNorm} and any(name.startswith("teacher.heads") for name in norms)
