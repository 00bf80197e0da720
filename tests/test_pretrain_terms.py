"""The losses as training calls them: which views and whose heads they read, what they aim at, and their sum."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from pretrain_pairs import tiny, write_pairs
from pretrain_terms import build, chance, encode, make_text
from torch import nn

from patchrank.errors import UserError
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.cost import recipe_macs
from patchrank.pretrain.loop import open_run, train_step
from patchrank.pretrain.losses.byol import prediction_loss
from patchrank.pretrain.losses.decoder import PatchDecoder
from patchrank.pretrain.losses.simclr import nt_xent
from patchrank.pretrain.recipes import RECIPES
from patchrank.pretrain.rules import check
from patchrank.text import PAD

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def tower():
    return make_tower(seed=1).requires_grad_(True)


@pytest.fixture(scope="module")
def text():
    return make_text()


@pytest.mark.parametrize("views", [(0, 1), (1, 2)])
def test_terms_between_views_read_the_views_they_name(tower, text, views):
    """Regression: A-CLIP's released SimCLR is called with the first view twice."""
    objectives = build(tower, text, "simclr", "byol")
    encoded = encode(tower, text, objectives, num_views=3)
    pooled_VBT, simclr, byol = encoded.pooled_VBT, objectives.terms["simclr"], objectives.terms["byol"]
    simclr.views = byol.views = views
    expected = nt_xent(simclr.head(pooled_VBT[views[0]]), simclr.head(pooled_VBT[views[1]]), 0.1)
    torch.testing.assert_close(simclr(encoded), expected)
    target_BE = encoded.teacher_heads["byol"](encoded.teacher.pooled_BC)
    each = [prediction_loss(byol.predictor(byol.followed(pooled_VBT[view])), target_BE) for view in views]
    torch.testing.assert_close(byol(encoded), (each[0] + each[1]) / 2)
    for term in (simclr, byol):
        (reached_VBT,) = torch.autograd.grad(term(encoded), pooled_VBT, retain_graph=True)
        assert (reached_VBT.abs().sum((1, 2)) > 0).tolist() == [view in views for view in range(3)]


@pytest.mark.parametrize("recipe", [name for name in RECIPES if len(RECIPES[name].terms) > 1])
def test_the_trained_loss_is_the_recipe_s_weighted_sum(pairs, tmp_path, recipe):
    found = train_step(open_run(tiny(pairs, tmp_path, recipe=recipe, batch_size=8)), 0)
    expected = sum(weight * found[name] for name, weight in RECIPES[recipe].terms.items())
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_given_weights_replace_the_recipe_s_and_zero_leaves_a_loss_out(pairs, tmp_path):
    run = open_run(tiny(pairs, tmp_path, recipe="aclip", batch_size=8, weights=("simclr=0", "byol=0.5")))
    found = train_step(run, 0)
    assert set(run.learner.objectives.terms) == {"clip", "byol"}
    assert found["loss"] == pytest.approx(found["clip"] + 0.5 * found["byol"], rel=1e-5)
    whole, config = PretrainConfig(recipe="aclip"), PretrainConfig(recipe="aclip", weights=("simclr=0", "byol=0"))
    assert recipe_macs(config, config.row) == recipe_macs(whole, RECIPES["att2x50"])


@pytest.mark.parametrize(
    ("weight", "word"),
    [("simclr", "loss=weight"), ("mlm=1", "aclip has clip, simclr, byol"), ("byol=-1", "0 or more"),
     ("byol=inf", "0 or more"), ("clip=0", "stays")],
)  # fmt: skip
def test_weights_that_make_no_sense_are_refused(weight, word):
    with pytest.raises(UserError, match=f"--weights {weight}.*{word}"):
        check(PretrainConfig(recipe="aclip", weights=(weight,)))


def test_soft_codewords_are_centred_and_sharpened_and_the_centre_follows(tower, text):
    objectives = build(tower, text, "distill")
    encoded, distill = encode(tower, text, objectives), objectives.terms["distill"]
    distill.centre_Q.copy_(torch.randn(12, generator=chance(5)))
    before_Q = distill.centre_Q.clone()
    logits_BNQ = encoded.teacher_heads["distill"](encoded.teacher.patch_BNC)
    torch.testing.assert_close(distill.targets(encoded), ((logits_BNQ - before_Q) / 0.04).softmax(-1))
    torch.testing.assert_close(distill.centre_Q, 0.9 * before_Q + 0.1 * logits_BNQ.mean((0, 1)))


def test_the_decoder_gets_every_patch_at_its_place():
    decoder = PatchDecoder(width=8, num_heads=2, num_layers=1, num_patches=5)
    decoder.decoder = nn.Identity()
    nn.init.constant_(decoder.missing, 3.0)
    nn.init.normal_(decoder.position, generator=chance(1))
    x_BLC, keep_BK = torch.randn(2, 1 + 3, 8, generator=chance(2)), torch.tensor([[4, 0, 2], [1, 2, 3]])
    found_BNC = decoder(x_BLC, keep_BK, 1)
    for row in range(2):
        expected_NC = torch.full((5, 8), 3.0)
        for place, patch in enumerate(keep_BK[row].tolist()):
            expected_NC[patch] = x_BLC[row, 1 + place]
        torch.testing.assert_close(found_BNC[row], expected_NC + decoder.position)


def test_padding_does_not_change_what_is_guessed(tower, text, monkeypatch):
    objectives = build(tower, text, "mlm")
    encoded, mlm = encode(tower, text, objectives), objectives.terms["mlm"]
    token_BL = encoded.token_BL[:, :12].clone()
    token_BL[:, 10:] = PAD
    chosen_BL = torch.zeros_like(token_BL, dtype=torch.bool)
    chosen_BL[:, 1:3] = True

    def padded(mask_BL, length):
        return F.pad(mask_BL, (0, length - mask_BL.shape[1]))

    losses = []
    for length in (12, 16):
        monkeypatch.setattr("patchrank.pretrain.losses.mlm.choose_tokens", lambda t, *_: padded(chosen_BL, t.shape[1]))
        monkeypatch.setattr(
            "patchrank.pretrain.losses.mlm.hide_tokens", lambda t, *_: (t, padded(chosen_BL, t.shape[1]))
        )
        given = SimpleNamespace(
            text_tower=text, token_BL=F.pad(token_BL, (0, length - 12), value=PAD), generator=chance()
        )
        losses.append(mlm(given))
    torch.testing.assert_close(losses[0], losses[1])
