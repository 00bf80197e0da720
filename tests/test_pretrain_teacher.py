"""The teacher: the moving average and its schedule, what it sees, and that nothing of it has a graph."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from torch import nn
from torch.overrides import TorchFunctionMode

from patchrank.pretrain.class_rows import run_with_class_rows
from patchrank.pretrain.ema import Ema, momentum_at
from patchrank.pretrain.teacher import Teacher, embed_resized, resize_position
from patchrank.text import TextConfig, TextTower


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def student():
    return make_tower(seed=1)


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(3, 3, 32, 32, generator=chance(7))


# the moving average


def test_average_equals_its_closed_form_in_float64():
    online = nn.Linear(5, 4)
    ema = Ema(online)
    momenta = [momentum_at(step, 20, base=0.6) for step in range(20)]
    weights = [online.weight.detach().double().clone()]
    for step in range(20):
        with torch.no_grad():
            online.weight.copy_(torch.randn(4, 5, generator=chance(step)))
        weights.append(online.weight.detach().double().clone())
        ema.update(online, momenta[step])
    expected, left = torch.zeros(4, 5, dtype=torch.float64), 1.0
    for weight, momentum in zip(reversed(weights[1:]), reversed(momenta)):
        expected += left * (1 - momentum) * weight
        left *= momentum
    torch.testing.assert_close(ema.model.weight.double(), expected + left * weights[0], atol=1e-6, rtol=1e-6)


def test_momentum_one_freezes_and_zero_copies():
    online, other = nn.Linear(3, 3), nn.Linear(3, 3)
    ema = Ema(online)
    ema.update(other, 1.0)
    assert torch.equal(ema.model.weight, online.weight)
    ema.update(other, 0.0)
    assert torch.equal(ema.model.weight, other.weight) and torch.equal(ema.model.bias, other.bias)


def test_schedule_runs_from_base_to_one_over_the_optimiser_s_steps():
    """Regression: A-CLIP's released schedule is read at a fraction of its length under accumulation."""
    for num_steps in (2, 100, 400):
        momenta = [momentum_at(step, num_steps) for step in range(num_steps)]
        assert momenta[0] == pytest.approx(0.996) and momenta[-1] == 1.0
        assert all(former <= latter for former, latter in pairwise(momenta))
    assert momentum_at(200, 401) == pytest.approx(0.998)
    assert momentum_at(0, 1) == pytest.approx(0.996)


def test_average_is_float32_and_buffers_follow_their_policy():
    online = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)).bfloat16()
    own, copied = Ema(online), Ema(online, buffers="copy")
    assert own.model[0].weight.dtype == torch.float32
    online[1].running_mean.fill_(3.0)
    for ema in (own, copied):
        ema.update(online, 0.5)
    assert (own.model[1].running_mean == 0).all() and (copied.model[1].running_mean == 3).all()
    with pytest.raises(ValueError, match="'own' or 'copy'"):
        Ema(online, buffers="mean")


# what it sees


def full_attention(block, x_BLC):
    """(B, L, L): post-softmax attention, mean over heads, in float64."""
    q, k, _ = (
        part.double().unflatten(-1, (block.num_heads, -1)).transpose(1, 2)
        for part in block.qkv(block.norm1(x_BLC)).chunk(3, -1)
    )
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_rows_equal_full_attention_maps(pool, patches, pictures):
    tower = make_tower(seed=4, pool=pool)
    x_BLC, expected = tower.embed(pictures), []
    tokens_BLC, rows_BSN = run_with_class_rows(tower, x_BLC, patches=patches)
    for block in tower.blocks:
        expected.append(full_attention(block, x_BLC)[:, 0, 1:])
        x_BLC = block(x_BLC)
    torch.testing.assert_close(rows_BSN.double(), torch.stack(expected, 1), atol=1e-5, rtol=1e-4)
    assert (rows_BSN > 0).all() and (rows_BSN.sum(-1) < 1).all() and rows_BSN.dtype == torch.float32
    assert tokens_BLC.shape[1] == (1 if pool == "class" and not patches else 17)
    torch.testing.assert_close(tokens_BLC, x_BLC[:, : tokens_BLC.shape[1]], atol=1e-4, rtol=1e-4)


class Shapes(TorchFunctionMode):
    """Records the shape of everything that any function of torch gives back."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return result


def test_no_map_of_all_tokens_by_all_tokens_is_ever_made(student, pictures):
    teacher = Teacher(student)
    with Shapes() as shapes, torch.no_grad():
        full_attention(student.blocks[0], student.embed(pictures))
    assert any(shape[-2:] == (17, 17) for shape in shapes.seen), "the recorder must see such maps"
    with Shapes() as shapes:
        teacher.look(pictures, patches=True)
        teacher.look(pictures)
    assert len(shapes.seen) > 5 and not any(shape[-2:] == (17, 17) for shape in shapes.seen)


def test_teacher_sees_what_the_tower_sees(student, pictures):
    seen = Teacher(student).look(pictures, patches=True, box_B4=torch.zeros(3, 4))
    torch.testing.assert_close(seen.feature_BD, student(pictures), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(student.proj(seen.pooled_BC), seen.feature_BD)
    x_BLC = student.norm(student.run(student.embed(pictures), 0, 4))
    torch.testing.assert_close(seen.patch_BNC, x_BLC[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen.patch_feature_BND, student.proj(x_BLC[:, 1:]), atol=1e-5, rtol=1e-5)
    assert seen.grid == (4, 4) and torch.equal(seen.box_B4, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="class token"):
        Teacher(make_tower(num_prefix=0, pool="mean")).look(pictures)


def test_nothing_of_the_teacher_has_a_graph(pictures):
    tower = make_tower(seed=5).requires_grad_(True)
    head = nn.Linear(32, 8)
    teacher = Teacher(tower, {"byol": head})
    seen = teacher.look(pictures.clone().requires_grad_(), patches=True)
    tensors = [seen.attention_BSN, seen.pooled_BC, seen.feature_BD, seen.patch_BNC, seen.patch_feature_BND]
    assert not any(tensor.requires_grad for tensor in [*tensors, teacher.heads["byol"](seen.pooled_BC)])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    loss = (tower(pictures) - seen.feature_BD - 1).square().sum() + head(
        tower.finish_pooled(tower.embed(pictures), 0)
    ).sum()
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    teacher.update(0.0, make_tower(seed=6), {"byol": head})
    assert not torch.equal(teacher.look(pictures).feature_BD, seen.feature_BD)


def test_rows_are_float32_under_autocast(student, pictures):
    teacher = Teacher(student)
    with torch.autocast("cpu", torch.bfloat16):
        seen = teacher.look(pictures)
    assert seen.attention_BSN.dtype == torch.float32
    torch.testing.assert_close(seen.attention_BSN, teacher.look(pictures).attention_BSN, atol=0.02, rtol=0.1)


# half resolution


def test_positions_resized_to_half_keep_constants_and_linear_fields():
    row, column = torch.meshgrid(torch.arange(14.0) + 0.5, torch.arange(14.0) + 0.5, indexing="ij")
    field_NC = torch.stack([torch.full((14, 14), 3.0), row, column, 2 * row - column], -1).flatten(0, 1)
    half_NC = resize_position(field_NC, (14, 14), (7, 7))
    assert half_NC.shape == (49, 4)
    expected = F.avg_pool2d(field_NC.T.reshape(1, 4, 14, 14), 2).flatten(2)[0].T.reshape(7, 7, 4)
    torch.testing.assert_close(half_NC[:, 0], torch.full((49,), 3.0))
    torch.testing.assert_close(half_NC.reshape(7, 7, 4)[1:-1, 1:-1], expected[1:-1, 1:-1])
    assert resize_position(field_NC, (14, 14), (14, 14)) is field_NC


def test_teacher_at_half_resolution(pictures):
    tower = make_tower(seed=7)
    torch.testing.assert_close(embed_resized(tower, pictures), tower.embed(pictures))
    seen = Teacher(tower).look(F.interpolate(pictures, (16, 16), mode="bilinear", antialias=True), patches=True)
    assert seen.grid == (2, 2) and seen.attention_BSN.shape == (3, 4, 4) and seen.patch_BNC.shape == (3, 4, 32)


def test_heads_and_the_whole_text_tower_follow():
    """Regression: A-CLIP's released code leaves the text tower's embeddings out of its average."""

    def make():
        return make_tower(), {"byol": nn.Linear(32, 8)}, TextTower(TextConfig(width=32, num_layers=1))

    teacher, (tower, heads, text) = Teacher(*make()), make()
    for module in (tower, heads["byol"], text):
        for parameter in module.parameters():
            parameter.data.add_(1.0)
    teacher.update(0.0, tower, heads, text)
    for ema, module in ((teacher.tower, tower), (teacher.heads["byol"], heads["byol"]), (teacher.text, text)):
        assert all(map(torch.equal, ema.model.parameters(), module.parameters()))
