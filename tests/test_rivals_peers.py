"""Rivals beside their authors' code on the same weights and tensors; that code is run, never copied.

A case runs where an environment variable (PATCHRANK_PEER_TOME, ...) names a checkout of the repository in PEERS, and
skips elsewhere. Only the named functions and classes of a file are executed, without the file's imports (an old timm,
CUDA), on our blocks. Results of one run: docs/rivals.md.

Letters: B batch, L tokens, N patches, C width, M metric channels.
"""

import ast
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Union

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from torch import Tensor, nn

from eval.rivals import avit, diffrate, dtem, evit, pitome, tofu, tome, visionzip
from eval.rivals.walk import Step
from patchrank.tower import Block, VisionTower

PEERS = {
    "TOME": ("facebookresearch/ToMe", "af95e4b"),
    "PITOME": ("hchautran/PiToMe", "550b5de"),
    "DIFFRATE": ("OpenGVLab/DiffRate", "91ae3e3"),
    "VISIONZIP": ("dvlab-research/VisionZip", "3151f6d"),
    "EVIT": ("youweiliang/evit", "5ca95a7"),
    "AVIT": ("NVlabs/A-ViT", "120c9cb"),
    "DTEM": ("movinghoon/DTEM", "13f2046"),
}
"""Name -> (repository on github.com, commit that was compared). ToFu published no code; PiToMe's holds a version."""
seeds = pytest.mark.parametrize("seed", [0, 1, 2])
TYPES = dict(Callable=Callable, Tuple=tuple, List=list, Union=Union, Optional=Optional)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def theirs(peer: str, file: str, *names: str, **given: Any) -> SimpleNamespace:
    """Functions and classes of one file of a checkout, with `given` in place of what the file imports."""
    variable, (repository, commit) = f"PATCHRANK_PEER_{peer}", PEERS[peer]
    path = Path(os.environ.get(variable, "")) / file
    if variable not in os.environ or not path.is_file():
        pytest.skip(f"{variable} names no checkout of github.com/{repository} (compared at {commit})")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    found = dict(torch=torch, nn=nn, F=F, math=math) | TYPES | given
    exec(compile(tree, str(path), "exec"), found)
    return SimpleNamespace(**{name: found[name] for name in names})


def same(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding: 1e-5 of the largest value. Prints the largest difference (shown by pytest -s)."""
    assert found.shape == expected.shape and expected.isfinite().all()
    scale = expected.abs().max().item()
    difference = (found - expected).abs().max().item() / scale
    print(f"{os.environ.get('PYTEST_CURRENT_TEST', '')}: {difference:.1e} of {scale:.2f}")
    assert difference <= 1e-5


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(seed: int) -> tuple[VisionTower, Tensor]:
    """A tower of 196 patches, 6 blocks and 3 heads of 16, and the tokens of two images."""
    tower = make_tower(seed, image_size=(112, 112), num_layers=6, width=48, num_heads=3, mlp_width=96)
    return tower, tower.embed(draw(2, 3, 112, 112, seed=seed))


def step_of(tower: VisionTower, layer: int, x_BLC: Tensor, size_BL: Tensor | None = None) -> Step:
    """Where a walk stands behind the attention of block `layer`."""
    before_BLC = tower.run(x_BLC, 0, layer)
    x_BLC, key_BLC = tower.blocks[layer].attend(before_BLC)
    return Step(layer, tower.blocks[layer], before_BLC, x_BLC, key_BLC, size_BL, tower.config.num_prefix)


def attention_like(kind: type, block: Block) -> nn.Module:
    """Their attention with our weights; `kind` derives from nn.Module in place of timm's Attention."""
    attention = kind()
    attention.qkv, attention.proj, attention.num_heads = block.qkv, block.out, block.num_heads
    attention.scale = (block.out.weight.shape[0] // block.num_heads) ** -0.5
    attention.attn_drop = attention.proj_drop = nn.Identity()
    return attention


def blocks_like(kind: type, attention: type, tower: VisionTower, **shared: Any) -> list[nn.Module]:
    """Their blocks with our weights and some attributes that all of them have."""
    found = []
    for block in tower.blocks:
        one = kind()
        one.attn, one.mlp = attention_like(attention, block), nn.Sequential(block.fc1, block.fc2)
        one.norm1, one.norm2, one.drop_path = block.norm1, block.norm2, nn.Identity()
        for name, value in shared.items():
            setattr(one, name, value)
        found.append(one.eval())
    return found


def through(blocks: list[nn.Module], tower: VisionTower, x_BLC: Tensor) -> Tensor:
    """The feature behind their blocks."""
    for block in blocks:
        x_BLC = block(x_BLC)
    return tower.head(x_BLC)


# ToMe, and DTEM, which merges as ToMe does

MERGING = ("do_nothing", "bipartite_soft_matching", "merge_wavg")


@pytest.mark.parametrize(("peer", "file"), [("TOME", "tome/merge.py"), ("DTEM", "dtem/utils.py")])
@pytest.mark.parametrize("num_tokens", [5, 16, 197])
@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_tome_merges_the_same(peer: str, file: str, num_tokens: int, num_prefix: int, share: float) -> None:
    original = theirs(peer, file, *MERGING)
    r = max(1, int(share * ((num_tokens - num_prefix) // 2)))
    metric_BLM, x_BLC = draw(3, num_tokens, 16, seed=num_tokens), draw(3, num_tokens, 24, seed=num_tokens + 1)
    size_BL = torch.randint(1, 9, (3, num_tokens), generator=torch.Generator().manual_seed(0)).float()
    merge, _ = original.bipartite_soft_matching(metric_BLM, r, num_prefix >= 1, num_prefix == 2)
    expected_BLC, expected_BL1 = original.merge_wavg(merge, x_BLC, size_BL.unsqueeze(-1))
    found_BLC, found_BL = tome.merge(x_BLC, size_BL, tome.match(metric_BLM, r, num_prefix), num_prefix)
    found_BLC = torch.cat([found_BLC, found_BL.unsqueeze(-1)], dim=-1)
    expected_BLC = torch.cat([expected_BLC, expected_BL1], dim=-1)
    if num_prefix == 0:  # without a class token the original leaves the unmerged in order of similarity
        found_BLC, expected_BLC = by_first_channel(found_BLC), by_first_channel(expected_BLC)
    same(found_BLC, expected_BLC)


def by_first_channel(x_BLC: Tensor) -> Tensor:
    """Tokens sorted by their first channel."""
    return x_BLC.gather(1, x_BLC[..., :1].argsort(dim=1).expand_as(x_BLC))


@seeds
def test_tome_walks_the_same(seed: int) -> None:
    tower, x_BLC = case(seed)
    merging = theirs("TOME", "tome/merge.py", *MERGING)
    kinds = theirs(
        "TOME",
        "tome/patch/timm.py",
        "ToMeBlock",
        "ToMeAttention",
        Block=nn.Module,
        Attention=nn.Module,
        **vars(merging),
    )
    r = [30, 20, 25, 15, 10]
    info = dict(r=[*r, 0], size=None, source=None, trace_source=False, prop_attn=True)
    info |= dict(class_token=True, distill_token=False)
    blocks = blocks_like(kinds.ToMeBlock, kinds.ToMeAttention, tower, _tome_info=info)
    same(tome.ToMe(tower, dict(enumerate(r))).forward_from(x_BLC), through(blocks, tower, x_BLC))


@seeds
def test_dtem_embeds_and_merges_the_same(seed: int) -> None:
    tower, x_BLC = case(seed)
    merging = theirs("DTEM", "dtem/utils.py", *MERGING)
    kinds = theirs("DTEM", "dtem/dtem.py", "DTEMLinear", "DTEMBlock", Block=nn.Module, **vars(merging))
    torch.manual_seed(seed)
    embedding = dtem.Embedding(tower.config)
    size_BL = torch.randint(1, 5, (2, 197), generator=torch.Generator().manual_seed(seed)).float()
    step = step_of(tower, 2, x_BLC, size_BL)
    linear = kinds.DTEMLinear(step.block.qkv, tower.config.width // tower.config.num_heads)
    linear.metric_layer.weight.copy_(embedding.layers["2"].weight)
    linear.metric_layer.bias.copy_(embedding.layers["2"].bias)
    _, metric_BLM = linear.eval()(step.block.norm1(step.before_BLC))
    expected_BLC, expected_BL, *_ = kinds.DTEMBlock()._merge_eval(step.x_BLC, size_BL, 40, {"metric": metric_BLM})
    found_BLC, found_BL = dtem.DTEM(tower, {2: 40}, embedding=embedding).reduce(step)
    same(found_BLC, expected_BLC)
    same(found_BL, expected_BL)


# PiToMe, and its version of ToFu


@seeds
def test_pitome_walks_the_same(seed: int) -> None:
    tower, x_BLC = case(seed)
    names = ("do_nothing", "bsm", "pitome", "pitome_bsm", "pitome_vision", "merge_source", "merge_wavg")
    merging = theirs("PITOME", "algo/pitome/merge.py", *names)
    kinds = theirs(
        *("PITOME", "algo/pitome/patch/timm.py", "PiToMeBlock", "PiToMeAttention"),
        **dict(Block=nn.Module, Attention=nn.Module) | vars(merging),
    )
    left, patches = {}, 196
    for layer in range(5):
        left[layer] = patches = patches - math.floor(patches - patches * 0.85)
    info = dict(ratio=[0.85] * 5 + [1.0], use_bsm_pitome=[True] * 3 + [False] * 3, size=None, source=None)
    info |= dict(trace_source=False, class_token=True)
    blocks = blocks_like(kinds.PiToMeBlock, kinds.PiToMeAttention, tower, _info=info)
    for layer, block in enumerate(blocks):
        block.init_margin(0.75 - 0.75 * layer / 6)
        # their attention takes sizes, their block passes none: we do, as the paper says
        block.attn.forward = lambda h_BLC, plain=block.attn.forward: plain(h_BLC, info["size"])
    same(pitome.PiToMe(tower, left).forward_from(x_BLC), through(blocks, tower, x_BLC))


@seeds
def test_tofu_prunes_the_same_and_mlerp_has_the_same_direction(seed: int) -> None:
    tower, x_BLC = case(seed)
    original = theirs("PITOME", "algo/tofu/merge.py", "do_nothing", "bipartite_soft_matching")
    step, ones_BL = step_of(tower, 2, x_BLC), torch.ones(2, 197)
    metric_BLM = step.block.mean_head(step.key_BLC)
    matched = tome.match(metric_BLM, math.floor(197 - 197 * 0.8), 1)
    merge = original.bipartite_soft_matching(metric_BLM, 0.8, class_token=True)
    same(tofu.drop_merged(step.x_BLC, ones_BL, matched, 1)[0], merge(step.x_BLC, mode="prune"))
    expected_BLC, found_BLC = merge(step.x_BLC, mode="tofu"), tofu.mlerp(step.x_BLC, ones_BL, matched, 1)[0]
    same(F.normalize(found_BLC, dim=-1), F.normalize(expected_BLC, dim=-1))


# DiffRate


@seeds
def test_diffrate_walks_the_same(seed: int) -> None:
    tower, x_BLC = case(seed)
    merging = theirs("DIFFRATE", "DiffRate/merge.py", "get_merge_func")
    kinds = theirs(
        *("DIFFRATE", "DiffRate/patch/deit.py", "DiffRateBlock", "DiffRateAttention"),
        **dict(Block=nn.Module, Attention=nn.Module) | vars(merging),
    )
    counts = {1: (150, 20), 2: (120, 0), 3: (80, 25), 4: (50, 30)}
    info = dict(size=torch.ones(2, 197, 1), mask=torch.ones(2, 197), trace_source=False)
    blocks = blocks_like(kinds.DiffRateBlock, kinds.DiffRateAttention, tower, _diffrate_info=info)
    patches = 196
    for layer, block in enumerate(blocks):
        patches, merged = counts.get(layer, (patches, 0))
        block.prune_ddp = SimpleNamespace(kept_token_number=1 + patches + merged)
        block.merge_ddp = SimpleNamespace(kept_token_number=1 + patches)
    same(diffrate.DiffRate(tower, counts).forward_from(x_BLC), through(blocks, tower, x_BLC))


# VisionZip


@pytest.mark.parametrize("K", [13, 64, 100])
@seeds
def test_visionzip_keeps_and_gathers_the_same(seed: int, K: int) -> None:
    tower, x_BLC = case(seed)
    original = theirs("VISIONZIP", "visionzip/clip_encoder.py", "CLIPVisionTower_VisionZip")
    step, (num_dominant, num_targets) = step_of(tower, 1, x_BLC), visionzip.split(K)
    q, k, _ = (
        part.unflatten(-1, (3, 16)).transpose(1, 2)
        for part in step.block.qkv(step.block.norm1(step.before_BLC)).chunk(3, -1)
    )
    layer = SimpleNamespace(metric=step.block.mean_head(step.key_BLC))
    outputs = SimpleNamespace(attentions=[(q @ k.mT / 4).softmax(-1), None], hidden_states=[step.x_BLC, None])

    class Model:
        vision_model = SimpleNamespace(encoder=SimpleNamespace(layers=[layer, None]))
        _info = dict(dominant=num_dominant, contextual=num_targets)

        def __call__(self, images: Tensor, **options: bool) -> SimpleNamespace:
            return outputs

    stub = SimpleNamespace(vision_tower=Model(), device="cpu", dtype=torch.float32)
    expected_BLC, _ = original.CLIPVisionTower_VisionZip.forward(stub, torch.empty(2))
    found_BLC, _ = visionzip.VisionZip(tower, 1, K).reduce(step)
    dominant = slice(1, 1 + num_dominant)  # theirs in order of the index, ours of the attention
    same(by_first_channel(found_BLC[:, dominant]), by_first_channel(expected_BLC[:, dominant]))
    rest = [0, *range(1 + num_dominant, 1 + K)]
    same(found_BLC[:, rest], expected_BLC[:, rest])


# EViT


@pytest.mark.parametrize("K", [10, 98, 180])
@seeds
def test_evit_keeps_the_same_and_fuses_by_the_same_weights(seed: int, K: int) -> None:
    tower, x_BLC = case(seed)
    index = theirs("EVIT", "helpers.py", "complement_idx")
    kinds = theirs("EVIT", "evit.py", "Attention", "Block", "DropPath", "Mlp", **vars(index))
    step = step_of(tower, 2, x_BLC)
    block = kinds.Block(48, 3, keep_rate=0.5, fuse_token=True)
    block.norm1 = step.block.norm1
    block.mlp.fc2.weight.zero_()
    block.mlp.fc2.bias.zero_()
    block.attn.qkv, block.attn.proj = step.block.qkv, step.block.out
    expected_BLC, *_ = block.eval()(step.before_BLC, tokens=K)
    attention_BN = evit.class_row(step.block, step.before_BLC, step.key_BLC)[:, 1:]
    found_BNC = evit.keep_and_fuse(step.x_BLC[:, 1:], attention_BN, K)
    same(found_BNC[:, :K], expected_BLC[:, 1 : 1 + K])
    rest_B1 = attention_BN.sort(dim=1, descending=True).values[:, K:].sum(1, keepdim=True)
    same(found_BNC[:, K] * rest_B1, expected_BLC[:, 1 + K])  # theirs does not divide by the sum of the weights


# A-ViT


@seeds
def test_avit_walks_the_same_with_the_same_tokens_halted(seed: int) -> None:
    tower, _ = case(seed)
    for ours in tower.blocks:  # small values of the channel that halts: a sigmoid of 1 would tie
        ours.out.weight[0] *= 0.1
        ours.fc2.weight[0] *= 0.1
    image_BCHW, spec = draw(2, 3, 112, 112, seed=seed), avit.spec_at(tower.config, 0.85)
    kinds = theirs(
        *("AVIT", "timm/models/act_vision_transformer.py", "Masked_Attention", "Block_ACT"),
        Mlp=lambda **options: nn.Identity(),
    )
    x_BLC, options = tower.embed(image_BCHW), SimpleNamespace(act_mode=4, gate_scale=5.0, gate_center=10.0)
    K_of, halted_BL, total_BL = dict(spec.counts(196)), torch.zeros(2, 197), torch.zeros(2, 197)
    for layer, ours in enumerate(tower.blocks):
        block = kinds.Block_ACT(48, 3, args=options)
        block.attn.qkv, block.attn.proj, block.mlp = ours.qkv, ours.out, nn.Sequential(ours.fc1, ours.fc2)
        block.norm1, block.norm2 = ours.norm1, ours.norm2
        x_BLC, (_, score_BL) = block.forward_act(x_BLC, halted_BL)
        total_BL = total_BL + score_BL
        if layer + 1 in K_of:
            total_BN = total_BL[:, 1:].masked_fill(halted_BL[:, 1:].bool(), torch.inf)
            stay_BK = 1 + total_BN.argsort(dim=1, stable=True)[:, : K_of[layer + 1]]
            halted_BL = torch.ones_like(halted_BL).scatter(1, stay_BK, 0.0)
            halted_BL[:, 0] = 0.0
    same(avit.AViT(tower, spec)(image_BCHW), tower.head(x_BLC))
