"""Every term of a pretraining loss by itself, and the weighted sum of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from pretrain_terms import build, chance, encode, make_text
from torch import nn

from patchrank.errors import UserError
from patchrank.pretrain.losses.byol import prediction_loss
from patchrank.pretrain.losses.contrastive import caption_ids
from patchrank.pretrain.losses.distill import masked_cross_entropy
from patchrank.pretrain.losses.mlm import choose_tokens, hide_tokens
from patchrank.pretrain.losses.simclr import nt_xent
from patchrank.pretrain.objectives import OBJECTIVES, Encoded, Objectives, Widths, contrastive_loss, distinct, positives
from patchrank.pretrain.teacher import Teacher
from patchrank.text import END, PAD, START, tokenize


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=chance(seed)), dim=-1)


@pytest.fixture(scope="module")
def tower():
    return make_tower(seed=1).requires_grad_(True)


@pytest.fixture(scope="module")
def text():
    return make_text()


# the sum


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_gives_a_finite_float32_scalar_and_trains_what_it_has(name, tower, text):
    objectives = build(tower, text, name)
    losses = objectives(encode(tower, text, objectives))
    assert set(losses) == {"loss", name} and losses["loss"].shape == () and losses["loss"].dtype == torch.float32
    tower.zero_grad()
    losses["loss"].backward()
    for own, parameter in objectives.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), own
    assert (tower.patch.weight.grad is not None) == (name != "mlm")


def test_total_is_the_weighted_sum_and_weight_zero_builds_nothing(tower, text):
    """A-CLIP: 0.5 + 0.5 of the two views, 1 SimCLR, 2 BYOL; the weight is applied once."""
    weights = {"clip": 1.0, "simclr": 1.0, "byol": 2.0}
    objectives = build(tower, text, *weights, **weights)
    encoded = encode(tower, text, objectives)
    losses = objectives(encoded)
    expected = losses["clip"] + losses["simclr"] + 2 * losses["byol"]
    torch.testing.assert_close(losses["loss"], expected)
    each = [OBJECTIVES["clip"](views=(view,))(encoded) for view in (0, 1)]
    torch.testing.assert_close(losses["clip"], 0.5 * each[0] + 0.5 * each[1])
    without = build(tower, text, *weights, **(weights | {"byol": 0.0, "simclr": 0.0}))
    assert list(without.terms) == ["clip"] and not list(without.parameters()) and without.followed == {}
    torch.testing.assert_close(without(encoded)["loss"], losses["clip"])
    for terms, word in (({"clap": (1.0, {})}, "clip, siglip"), ({"clip": (0.0, {})}, "not 0")):
        with pytest.raises(UserError, match=word):
            Objectives(terms, Widths.of(tower, text))


def test_a_term_s_weight_does_not_reach_the_teacher(tower, text):
    states = []
    for weight in (0.5, 2.0):
        objectives = build(tower, text, "clip", "byol", byol=weight)
        teacher = Teacher(tower, objectives.followed)
        before = {name: tensor.clone() for name, tensor in teacher.state_dict().items() if "running" not in name}
        encoded = encode(tower, text, objectives, teacher_heads=teacher.heads)
        objectives(encoded)["loss"].backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())
        states.append({name: teacher.state_dict()[name] for name in before if "num_batches" not in name})
        assert all(torch.equal(before[name], tensor) for name, tensor in states[-1].items())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# picture and text


def test_clip_is_clip_s_loss(tower, text):
    encoded = encode(tower, text, build(tower, text, "clip"), num_views=1)
    image_BD, text_BD = F.normalize(encoded.feature_VBD[0], dim=-1), F.normalize(encoded.text_BD, dim=-1)
    logits, target = 5.0 * image_BD @ text_BD.T, torch.arange(6)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    found = OBJECTIVES["clip"]()
    torch.testing.assert_close(found(encoded), expected)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = Encoded(feature_VBD=encoded.feature_VBD[:, order], text_BD=encoded.text_BD[order], scale=encoded.scale)
    torch.testing.assert_close(found(shuffled), expected)
    twice = Encoded(feature_VBD=encoded.feature_VBD.repeat(2, 1, 1), text_BD=encoded.text_BD, scale=encoded.scale)
    torch.testing.assert_close(found(twice), expected)


def test_true_captions_of_others_are_positives():
    captions = [("a two", "a red two"), ("a two", "a blue two"), ("a six", "a red six"), ("a six",)]
    drawn = ["a two", "a blue two", "a red six", "a six"]
    caption_BM, drawn_B = caption_ids(captions, drawn)
    assert caption_BM.shape == (4, 2) and caption_BM[3, 1] == -1 and (drawn_B >= 0).all()
    image_BD, text_BD = unit(4, 5, seed=0), unit(4, 5, seed=1)
    encoded = Encoded(
        feature_VBD=image_BD[None], text_BD=text_BD, scale=torch.tensor(3.0), caption_BM=caption_BM, drawn_B=drawn_B
    )
    texts, count_U = distinct(drawn)
    expected = contrastive_loss(image_BD, text_BD, positives(captions, texts), count_U, torch.tensor(3.0))
    torch.testing.assert_close(OBJECTIVES["clip"]()(encoded), expected)
    sigmoid = OBJECTIVES["siglip"]()
    total = 0.0
    for i in range(4):
        for j in range(4):
            sign = 1 if drawn[j] in captions[i] else -1
            total += math.log1p(math.exp(-sign * (3.0 * float(image_BD[i] @ text_BD[j]) - 10.0))) / 4
    assert float(sigmoid(encoded).detach()) == pytest.approx(total, rel=1e-4)


# view and view


def test_both_views_get_a_gradient():
    """Regression: A-CLIP's released SimCLR compares the first view with itself."""
    first, second = (torch.randn(6, 4, generator=chance(seed)).requires_grad_() for seed in (0, 1))
    loss = nt_xent(first, second)
    loss.backward()
    assert (first.grad.abs().sum(1) > 0).all() and (second.grad.abs().sum(1) > 0).all()
    torch.testing.assert_close(nt_xent(second, first), loss)
    unit_first = F.normalize(first.detach(), dim=-1)
    pull = ((unit_first @ unit_first.T - 1) / 0.1).exp().fill_diagonal_(0).sum(1)
    bugged = (1 + 2 * pull).log().mean()
    torch.testing.assert_close(nt_xent(first, first), bugged)
    assert abs(float((bugged - loss).detach())) > 0.5


def test_nt_xent_by_hand_and_collapsed():
    first, second = torch.randn(5, 3, generator=chance(0)), torch.randn(5, 3, generator=chance(1))
    both = F.normalize(torch.cat([first, second]), dim=-1)
    similarity = (both @ both.T / 0.1).fill_diagonal_(float("-inf"))
    expected = F.cross_entropy(similarity, torch.cat([torch.arange(5, 10), torch.arange(5)]))
    torch.testing.assert_close(nt_xent(first, second), expected)
    same = torch.ones(7, 4)
    assert float(nt_xent(same, same)) == pytest.approx(math.log(2 * 7 - 1), rel=1e-5)


# view and teacher


def test_prediction_loss_lies_in_its_range():
    target = torch.randn(8, 5, generator=chance(0)).requires_grad_()
    predicted = (3 * target.detach()).requires_grad_()
    assert float(prediction_loss(predicted, target).detach()) == pytest.approx(0.0, abs=1e-6)
    assert float(prediction_loss(-predicted, target).detach()) == pytest.approx(4.0)
    loss = prediction_loss(torch.randn(8, 5, generator=chance(1)).requires_grad_(), target)
    assert 0 < loss.item() < 4
    loss.backward()
    assert target.grad is None


def test_byol_s_target_does_not_depend_on_the_predictor(tower, text):
    objectives = build(tower, text, "byol")
    encoded = encode(tower, text, objectives)
    expected = encoded.teacher_heads["byol"](encoded.teacher.pooled_BC)
    with torch.no_grad():
        for parameter in objectives.terms["byol"].predictor.parameters():
            parameter.add_(1.0)
    assert torch.equal(encoded.teacher_heads["byol"](encoded.teacher.pooled_BC), expected)
    assert not expected.requires_grad


# masked self-distillation


def test_only_hidden_places_count():
    student, target = torch.randn(2, 5, 4, generator=chance(0)), torch.rand(2, 5, 4, generator=chance(1)).softmax(-1)
    hidden_BN = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    found = masked_cross_entropy(student, target, hidden_BN)
    parts = [F.cross_entropy(student[b, n], target[b, n]) for b, n in hidden_BN.nonzero().tolist()]
    torch.testing.assert_close(found, torch.stack(parts).mean())
    student[~hidden_BN], target[~hidden_BN] = 99.0, 1.0
    torch.testing.assert_close(masked_cross_entropy(student, target, hidden_BN), found)


def test_distillation_counts_what_the_student_did_not_see(tower, text, monkeypatch):
    seen = {}

    def spy(student_BNQ, target_BNQ, hidden_BN):
        seen["hidden"] = hidden_BN
        return masked_cross_entropy(student_BNQ, target_BNQ, hidden_BN)

    monkeypatch.setattr("patchrank.pretrain.losses.distill.masked_cross_entropy", spy)
    objectives = build(tower, text, "distill")
    image_BCHW = torch.randn(6, 3, 32, 32, generator=chance(0)).requires_grad_()
    encoded = encode(tower, text, objectives, image_BCHW=image_BCHW)
    objectives(encoded)["loss"].backward()
    reached_BN = F.avg_pool2d(image_BCHW.grad.abs().sum(1, keepdim=True), 8).flatten(1) > 0
    assert torch.equal(seen["hidden"], ~reached_BN) and (reached_BN.sum(1) == 4).all()


def test_distillation_hides_patches_from_the_student_and_not_from_the_teacher(tower, text):
    objectives = build(tower, text, "distill")
    encoded = encode(tower, text, objectives)
    lengths = []
    handle = tower.blocks[0].register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    objectives(encoded)
    handle.remove()
    assert lengths == [1 + 4] and encoded.teacher.patch_BNC.shape[1] == 16
    target_BNQ = objectives.terms["distill"].targets(encoded)
    assert not target_BNQ.requires_grad
    torch.testing.assert_close(target_BNQ.sum(-1), torch.ones(6, 16))
    centre = objectives.terms["distill"].centre_Q.clone()
    objectives.eval()
    objectives(encoded)
    assert centre.abs().sum() > 0 and torch.equal(objectives.terms["distill"].centre_Q, centre)


# text alone


def test_only_bytes_are_guessed_and_most_are_hidden():
    token_BL = tokenize(["abcdefgh" * 20] * 100, 64)
    chosen_BL = choose_tokens(token_BL, 0.2, chance())
    special_BL = (token_BL == START) | (token_BL == END) | (token_BL == PAD)
    assert not chosen_BL[special_BL].any() and 0.17 < chosen_BL[~special_BL].float().mean() < 0.23
    read_BL, hidden_BL = hide_tokens(token_BL, chosen_BL, chance(1))
    assert torch.equal(read_BL[~chosen_BL], token_BL[~chosen_BL]) and not hidden_BL[~chosen_BL].any()
    assert 0.75 < hidden_BL[chosen_BL].float().mean() < 0.85
    assert 0.05 < (read_BL != token_BL)[chosen_BL].float().mean() < 0.15
    assert read_BL[chosen_BL].max() < 256


def test_mlm_counts_chosen_bytes_only_and_padding_changes_nothing(tower, text):
    objectives = build(tower, text, "mlm")
    encoded = encode(tower, text, objectives)
    found = objectives(encoded)["loss"]
    assert float(found.detach()) == pytest.approx(math.log(259), rel=0.2), "an untrained guess is as good as chance"
    nothing = Encoded(
        feature_VBD=encoded.feature_VBD,
        text_BD=encoded.text_BD,
        scale=encoded.scale,
        text_tower=text,
        token_BL=torch.tensor([[START, END, PAD]]),
        generator=chance(),
    )
    assert float(objectives(nothing)["loss"].detach()) == 0.0
    state = nn.Module.state_dict(text)
    assert state["token.weight"].shape[0] == 259, "the checkpoint's vocabulary must stay as it is"


def test_cut_captions_keep_their_end_token(text):
    """Regression: A-CLIP's released tokenizer cuts the end token off and reads the feature somewhere else."""
    token_BL = tokenize(["x" * 300, "short"], 16)
    assert token_BL[0, -1] == END and (token_BL == END).sum(1).tolist() == [1, 1]
    longer = text(tokenize(["x" * 300], 16))
    torch.testing.assert_close(longer, text(tokenize(["x" * 14 + "tail"], 16)))
