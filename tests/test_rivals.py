"""eval/rivals: every row of the table (MACs, budgets, batches, dense limit), ToMe, EViT and the rows of one cut."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from hypothesis import given, settings
from hypothesis import strategies as st
from made_files import make_files
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import patchrank
from eval.rivals import (
    CALIBRATED,
    FILES,
    OURS,
    RIVALS,
    TRAINING_FREE,
    NotGiven,
    build,
    covering,
    evit,
    golden,
    low_resolution,
    tome,
)
from eval.rivals.budget import Rival, nearest_setting
from patchrank.errors import UserError
from patchrank.macs import dense_macs
from patchrank.presets import spec_for_macs
from patchrank.pruned import PrunedTower
from patchrank.scorers import SCORERS
from patchrank.torchvision_shim import ensure_torchvision
from patchrank.tower import TowerConfig, VisionTower

VIT_TI = TowerConfig(image_size=(224, 224), patch_size=16, width=192, num_layers=12, num_heads=3, mlp_width=768)
BUDGETS = (0.85, 0.70, 0.56, 0.45)
CALIBRATED_AT = 0.56
NO_CLASS = dict(num_prefix=0, pool="mean")
NEEDS_CLASS = {
    *("evit", "evit-staged", "diffrate", "diffrate-equal", "visionzip"),
    *("drop-class-attention", "fold-class-attention"),
}
NEVER_WHOLE = {
    *("drop-class-attention", "fold-class-attention", "drop-farthest", "fold-farthest"),
    *(name for name, row in RIVALS.items() if row.family == "ours" and row.needs),
    *(f"{name}-{suffix}" for name in CALIBRATED for suffix in ("calibrated", "lora")),
}
"""Their choice costs something, so the whole budget buys less than the whole tower."""
KINDS = {getattr(row.build, "func", row.build): name for name, row in reversed(RIVALS.items())}.values()
"""The first row of every build function; the others differ in its settings only."""
every_rival = pytest.mark.parametrize("name", RIVALS)
every_kind = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _quick_oracle(monkeypatch):
    """The table's tests are about budgets and batches: the cheapest search will do."""
    monkeypatch.setattr(golden, "DEFAULT", "sweep")


@pytest.fixture
def tower() -> VisionTower:
    return make_tower(num_layers=6)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """What the rows of the `tower` fixture need."""
    return make_files(tmp_path_factory.mktemp("files"), make_tower(num_layers=6), (0.7,))


@pytest.fixture(scope="module")
def thin(tmp_path_factory) -> tuple[VisionTower, dict[str, Path]]:
    """A ViT-Ti of half its width: 196 patches and 12 blocks, with the files of all rows."""
    tower = make_tower(**(vars(VIT_TI) | dict(width=96, mlp_width=384, output_dim=None)))
    return tower, make_files(tmp_path_factory.mktemp("thin"), tower, (CALIBRATED_AT,))


@pytest.fixture(scope="module", params=["mean", "attention", "registers"])
def kind(request, tmp_path_factory) -> tuple[VisionTower, dict[str, Path]]:
    """Towers of all kinds, 42 patches and 4 blocks, with the files of all rows; registers: pooled by class token."""
    changes = dict(mean=NO_CLASS, attention=dict(num_prefix=0, pool="attention"), registers=dict(num_prefix=5))
    tower = make_tower(image_size=(48, 56), width=24, num_heads=3, **changes[request.param])
    return tower, make_files(tmp_path_factory.mktemp("kind"), tower, (0.8,))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def meta(config: TowerConfig) -> VisionTower:
    with torch.device("meta"):
        return VisionTower(config).eval().requires_grad_(False)


def counted(rival: Rival) -> int:
    """MACs that PyTorch counts in a forward pass on the meta device; an oracle is given its ranking."""
    config = rival.tower.config
    rival, image = copy.deepcopy(rival).to("meta"), torch.empty(1, 3, *config.image_size, device="meta")
    known = (torch.empty(1, config.num_patches, device="meta"),) if isinstance(rival, golden.Golden) else ()
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        rival(image, *known)
    return counter.get_total_flops() // 2


@every_rival
def test_budgets_are_met_within_one_percent(name: str, thin: tuple) -> None:
    tower, files = thin
    for macs in (CALIBRATED_AT,) if {"calibrated-rivals", "lora-rivals"} & set(RIVALS[name].needs) else BUDGETS:
        rival = build(name, tower, macs, files)
        if RIVALS[name].exact:
            assert abs(rival.macs_share - macs) <= 0.01 * macs
        assert RIVALS[name].family != "ours" or rival.macs_share <= macs


@every_kind
def test_macs_are_exact(name: str, kind: tuple) -> None:
    tower, files = kind
    if name.removesuffix("-calibrated").removesuffix("-lora") in NEEDS_CLASS and tower.config.num_prefix == 0:
        with pytest.raises(UserError, match="needs a class token"):
            build(name, tower, 0.8, files)
        return
    rival = build(name, tower, 0.8, files)
    assert rival.macs == counted(rival)


@every_rival
def test_features_are_the_images_own_and_weights_stay(
    name: str, tower: VisionTower, images: Tensor, files: dict[str, Path]
) -> None:
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    rival, again = (build(name, tower, 0.7, files) for _ in range(2))
    feature, alone = rival(images[:2]), rival(images[1:2])
    assert feature.shape == (2, 24) and feature.isfinite().all()
    assert not torch.allclose(feature, tower(images[:2]), atol=1e-4), "nothing was saved"
    assert torch.equal(alone, again(images[1:2]))
    torch.testing.assert_close(feature[1:], alone, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in tower.state_dict().items())


@every_rival
def test_the_whole_budget_is_the_dense_tower(
    name: str, tower: VisionTower, images: Tensor, files: dict[str, Path]
) -> None:
    if name not in NEVER_WHOLE:
        torch.testing.assert_close(build(name, tower, 1.0, files)(images), tower(images), atol=2e-4, rtol=1e-4)


@every_kind
def test_budgets_out_of_reach_are_refused(name: str, tower: VisionTower, files: dict[str, Path]) -> None:
    for macs in (0.001, 0.0, 1.5, float("nan")):
        if macs == 0.001 and not RIVALS[name].exact:
            continue  # they take the nearest that they have
        with pytest.raises(UserError, match=f"macs[= ]{macs:g}"):
            build(name, tower, macs, files)


@every_rival
def test_rows_without_their_file_say_how_to_make_it(
    name: str, tower: VisionTower, files: dict[str, Path], tmp_path: Path
) -> None:
    needs = RIVALS[name].needs
    assert (not needs) == (name in TRAINING_FREE or RIVALS[name].family == "oracle")
    for needed in needs:
        with pytest.raises(NotGiven, match=f"{name}: skipped, needs .*python -m"):
            build(name, tower, 0.7, {other: tmp_path for other in FILES if other != needed})
        with pytest.raises(UserError) as caught:
            build(name, tower, 0.7, files | {needed: tmp_path})
        assert str(tmp_path) in str(caught.value) and not isinstance(caught.value, NotGiven)


def test_files_may_have_a_part_for_each_budget(tower: VisionTower, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "0.7").mkdir()
    (tmp_path / "0.7" / "dtem.safetensors").write_bytes((files["dtem"] / "dtem.safetensors").read_bytes())
    assert build("dtem", tower, 0.7, {"dtem": tmp_path}).macs == build("dtem", tower, 0.7, files).macs
    with pytest.raises(UserError, match="is no embedding"):
        build("dtem", tower, 0.6, {"dtem": tmp_path})


def test_unknown_rivals_list_the_known(tower: VisionTower) -> None:
    with pytest.raises(UserError, match=r"'tomee': unknown; choose one of ours, .*tome"):
        build("tomee", tower, 0.7)


@given(costs=st.lists(st.integers(1, 1000), min_size=1, max_size=30), macs=st.floats(0.01, 1.0))
def test_nearest_setting_is_the_nearest(costs: list[int], macs: float) -> None:
    config = make_tower().config
    dense = dense_macs(config)
    rising = [dense * cost // 1000 for cost in sorted(costs)]
    if macs * dense < rising[0]:
        with pytest.raises(UserError):
            nearest_setting(config, macs, rising.__getitem__, len(rising) - 1, 0)
        return
    found = nearest_setting(config, macs, rising.__getitem__, len(rising) - 1, 0)
    assert abs(rising[found] - macs * dense) == min(abs(cost - macs * dense) for cost in rising)


# ToMe


def slow_tome(x_LC: Tensor, size_L: Tensor, metric_LM: Tensor, r: int, num_prefix: int) -> list[tuple[Tensor, float]]:
    """One image, python loops, straight from the paper: [(token, size)] of unmerged A in order, then B."""
    a_side = [index for index in range(len(x_LC)) if index % 2 == 0]
    b_side = [index for index in range(len(x_LC)) if index % 2 == 1]
    edges = []
    for a in a_side:
        if a < num_prefix:
            continue
        hosts = [b for b in b_side if b >= num_prefix]
        cosines = [F.cosine_similarity(metric_LM[a], metric_LM[b], dim=0).item() for b in hosts]
        best = max(range(len(hosts)), key=cosines.__getitem__)
        edges.append((cosines[best], a, hosts[best]))
    strongest = sorted(edges, reverse=True)[:r]
    members = {b: [b] for b in b_side}
    for _, a, b in strongest:
        members[b].append(a)
    merged = {a for _, a, _ in strongest}
    tokens = [(x_LC[a], size_L[a].item()) for a in a_side if a not in merged]
    for group in members.values():
        total = sum(size_L[index] for index in group)
        tokens.append((sum(x_LC[index] * size_L[index] for index in group) / total, total.item()))
    return tokens


@settings(max_examples=40)
@given(
    num_patches=st.integers(2, 17),
    num_prefix=st.integers(0, 5),
    share=st.floats(0, 1),
    seed=st.integers(0, 10_000),
)
def test_tome_merges_as_the_loops_do(num_patches: int, num_prefix: int, share: float, seed: int) -> None:
    r = round(share * (num_patches // 2))
    num_tokens = num_prefix + num_patches
    x_BLC, metric_BLM = draw(2, num_tokens, 5, seed=seed), draw(2, num_tokens, 3, seed=seed + 1)
    size_BL = torch.randint(1, 6, (2, num_tokens), generator=torch.Generator().manual_seed(seed)).float()
    size_BL[:, :num_prefix] = 1
    matched = tome.match(metric_BLM, r, num_prefix)
    merged_BLC, merged_size_BL = tome.merge(x_BLC, size_BL, matched)
    assert merged_BLC.shape == (2, num_tokens - r, 5)
    for image in range(2):
        expected = slow_tome(x_BLC[image], size_BL[image], metric_BLM[image], r, num_prefix)
        torch.testing.assert_close(merged_BLC[image], torch.stack([token for token, _ in expected]))
        torch.testing.assert_close(merged_size_BL[image], torch.tensor([size for _, size in expected]))
    torch.testing.assert_close(merged_size_BL.sum(1), size_BL.sum(1))


def test_tome_never_touches_prefix_tokens() -> None:
    x_BLC = draw(2, 12, 4)
    x_BLC[:, :3] = 100.0 + torch.arange(3.0).view(1, 3, 1)
    metric_BLM = torch.ones(2, 12, 3)
    merged_BLC, size_BL = tome.merge(x_BLC, torch.ones(2, 12), tome.match(metric_BLM, 4, 3))
    for value in (100.0, 101.0, 102.0):
        assert ((merged_BLC == value).all(-1).sum(1) == 1).all()
    assert merged_BLC[:, 0].eq(100.0).all() and size_BL[:, 0].eq(1).all(), "the class token is the first"


def test_tome_attention_counts_a_token_as_often_as_it_stands_for() -> None:
    """Images of equal pairs of patches: merging the pairs changes no attention output, so the feature stays."""
    tower = make_tower(image_size=(8, 64), num_layers=3)
    image = torch.cat([torch.cat([draw(2, 3, 8, 8, seed=n)] * 2, dim=3) for n in range(4)], dim=3)
    tower.position.copy_(tower.position[0].expand_as(tower.position))
    merged = tome.ToMe(tower, {0: 4})
    assert merged.tokens(tower.embed(image))[1].shape == (2, 5)
    torch.testing.assert_close(merged(image), tower(image), atol=1e-4, rtol=1e-4)


def test_tome_walk_is_merging_between_attention_and_mlp(tower: VisionTower, images: Tensor) -> None:
    x_BLC, key_BLC = tower.blocks[0].attend(tower.embed(images))
    metric_BLM = key_BLC.unflatten(-1, (4, 8)).mean(2)
    x_BLC, size_BL = tome.merge(x_BLC, torch.ones(3, 17), tome.match(metric_BLM, 6, 1))
    expected = tower.finish(tower.blocks[0].mlp(x_BLC), 1, size_BL)
    torch.testing.assert_close(tome.ToMe(tower, {0: 6})(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_tome_sizes_add_up_behind_every_block(pool: str, images: Tensor) -> None:
    tower = make_tower(pool=pool, num_layers=6)
    merging = tome.build(tower, 0.7)
    _, size_BL = merging.tokens(tower.embed(images))
    torch.testing.assert_close(size_BL.sum(1), torch.full((3,), 17.0))
    assert size_BL.shape[1] == 17 - sum(merging.r.values())


@given(total=st.integers(0, 400), first=st.integers(0, 10), length=st.integers(1, 11))
def test_tome_spreads_r_evenly_and_halves_at_most(total: int, first: int, length: int) -> None:
    layers = tome.blocks_between(VIT_TI, first, min(10, first + length - 1))
    r = tome.spread_r(VIT_TI, layers, total)
    left = 196
    for layer in layers:
        assert r[layer] <= left // 2
        assert r[layer] == left // 2 or r[layer] in (total // len(layers), total // len(layers) + 1)
        left -= r[layer]
    assert sum(r.values()) <= total


def test_tome_blocks_are_named_as_published() -> None:
    assert tome.blocks_between(VIT_TI, 2, 5) == (2, 3, 4, 5)
    assert tome.blocks_between(VIT_TI, 0, 11) == tuple(range(11)), "the last block computes one row"
    mean_pooled = TowerConfig(**(vars(VIT_TI) | NO_CLASS))
    assert tome.blocks_between(mean_pooled, 0, 11) == tuple(range(12))
    deeper = TowerConfig(**(vars(VIT_TI) | {"num_layers": 24}))
    assert tome.blocks_between(deeper, 2, 5) == tuple(range(4, 12))


# EViT


def test_evit_class_row_is_the_attention_of_the_block(tower: VisionTower, images: Tensor) -> None:
    x_BLC = tower.embed(images)
    block = tower.blocks[0]
    q, k, _ = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in block.qkv(block.norm1(x_BLC)).chunk(3, -1))
    attention_BHLL = (q @ k.mT / 8**0.5).softmax(-1)
    _, key_BLC = block.attend(x_BLC)
    torch.testing.assert_close(evit.class_row(block, x_BLC, key_BLC), attention_BHLL.mean(1)[:, 0])


def test_evit_keeps_the_attended_and_fuses_the_others() -> None:
    patches_BNC, attention_BN = draw(2, 9, 4), draw(2, 9, seed=1).softmax(-1) * 0.9
    kept = evit.keep_and_fuse(patches_BNC, attention_BN, 5)
    assert kept.shape == (2, 6, 4)
    for image in range(2):
        order = sorted(range(9), key=lambda i: -attention_BN[image, i].item())
        torch.testing.assert_close(kept[image, :5], patches_BNC[image, order[:5]])
        weights = [attention_BN[image, i] / sum(attention_BN[image, j] for j in order[5:]) for i in order[5:]]
        fused = sum(weight * patches_BNC[image, i] for weight, i in zip(weights, order[5:]))
        torch.testing.assert_close(kept[image, 5], fused)


def test_evit_stages_stand_as_published() -> None:
    assert evit.stages(12) == (3, 6, 9)
    assert all(evit.stages(depth)[-1] < depth - 1 for depth in range(4, 30))
    counts = evit.counts(VIT_TI, (3, 6, 9), 0.7)
    assert counts == {3: 137, 6: 97, 9: 69}, "the fused token is a patch of the next stage"
    rival = build("evit-staged", meta(VIT_TI), 0.56)
    assert list(rival.K_of) == [3, 6, 9]


# Rows of the pruned tower


@settings(max_examples=30)
@given(num_patches=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 10_000))
def test_farthest_points_are_farthest(num_patches: int, share: float, seed: int) -> None:
    K = max(1, round(share * num_patches))
    metric_BNM = draw(2, num_patches, 3, seed=seed)
    order_BN = covering.farthest_points(metric_BNM, K)
    assert (order_BN.sort(1).values == torch.arange(num_patches)).all()
    unit_BNM = F.normalize(metric_BNM, dim=-1)
    for unit_NM, order_N in zip(unit_BNM, order_BN.tolist()):
        for place in range(1, K):
            taken = order_N[:place]
            nearest = [(unit_NM[i] @ unit_NM[taken].T).max().item() for i in range(num_patches) if i not in taken]
            chosen = (unit_NM[order_N[place]] @ unit_NM[taken].T).max().item()
            assert chosen == pytest.approx(min(nearest), abs=1e-6)
        assert order_N[K:] == sorted(order_N[K:])


def keep_sets(rival: covering.Pruned, images: Tensor) -> list[set[int]]:
    _, cuts = rival.pruned.tokens(images)
    return [set(kept) for kept in cuts[0].keep_BK.tolist()]


def test_drop_rows_drop_by_their_scorer(tower: VisionTower, images: Tensor) -> None:
    for name in ("random", "checkerboard", "centre", "token-norm", "class-attention"):
        rival = build(f"drop-{name}", tower, 0.7)
        spec = rival.pruned.spec
        assert (spec.rest, spec.select, [layer for layer, _ in spec.cuts]) == ("drop", "topk", [1])
        score: Callable = SCORERS[name](tower.config.grid)
        expected = PrunedTower(tower, spec, score)(images)
        torch.testing.assert_close(rival(images), expected)
    fixed = keep_sets(build("drop-checkerboard", tower, 0.7), images)
    assert fixed[0] == fixed[1] == fixed[2]


def test_farthest_fold_keeps_everything_in_sizes(tower: VisionTower, images: Tensor) -> None:
    rival = build("fold-farthest", tower, 0.7)
    state, _ = rival.pruned.tokens(images)
    torch.testing.assert_close(state.size_BN.sum(1), torch.full((3,), 16.0))
    key_BLC = tower.blocks[1].keys(tower.run(tower.embed(images), 0, 1))
    metric_BNM = key_BLC.unflatten(-1, (4, 8)).mean(2)[:, 1:]
    K = state.size_BN.shape[1]
    expected = covering.farthest_points(metric_BNM, K)[:, :K]
    assert keep_sets(rival, images) == [set(kept) for kept in expected.tolist()]


def test_ours_is_what_apply_does(images: Tensor) -> None:
    if find_spec("timm") is not None:
        ensure_torchvision()
    timm = pytest.importorskip("timm")
    shape = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=0)
    model = timm.models.VisionTransformer(**shape).eval()
    applied = patchrank.apply(model, macs=0.7)
    towers = [module for module in applied.modules() if isinstance(module, PrunedTower)]
    rival = build(OURS, towers[0].tower, 0.7)
    assert rival.pruned.spec == towers[0].spec
    assert torch.equal(rival(images), towers[0](images))
    assert len(build("ours-low-latency", towers[0].tower, 0.7).pruned.spec.cuts) == 1
    assert build("ours-random", towers[0].tower, 0.7).pruned.spec == spec_for_macs(towers[0].config, 0.7)


# Low resolution


def test_low_resolution_takes_the_nearest_grid() -> None:
    for macs in BUDGETS:
        rival = build("low-resolution", meta(VIT_TI), macs)
        costs = [dense_macs(low_resolution.at_grid(VIT_TI, grid)) for grid in low_resolution.grids(VIT_TI)]
        target = macs * dense_macs(VIT_TI)
        assert abs(rival.macs - target) == min(abs(cost - target) for cost in costs)
    assert all(abs(row - column) <= 1 for row, column in low_resolution.grids(VIT_TI))
    assert all(
        row == 1 or 1 <= column / row <= 3
        for row, column in low_resolution.grids(make_tower(image_size=(32, 64)).config)
    )


def test_low_resolution_resizes_a_smooth_position_map() -> None:
    row_HW = torch.arange(16.0).view(16, 1).expand(16, 16)
    position_NC = torch.stack([row_HW, row_HW.T], dim=-1).reshape(256, 2)
    small = low_resolution.resize_position(position_NC, (16, 16), (8, 8)).view(8, 8, 2)
    away_from_the_border = small[2:6, 2:6]
    expected = (2 * torch.arange(2.0, 6.0) + 0.5).view(4, 1).expand(4, 4)
    torch.testing.assert_close(away_from_the_border[:, :, 0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(away_from_the_border[:, :, 1], expected.T, atol=1e-4, rtol=0)
    same = low_resolution.resize_position(position_NC, (16, 16), (16, 16))
    torch.testing.assert_close(same, position_NC, atol=1e-4, rtol=0)


def test_low_resolution_reads_the_resized_image(tower: VisionTower) -> None:
    """An image of one colour: patches differ by their position only, whatever the resolution."""
    rival = build("low-resolution", tower, 0.5)
    flat = torch.full((1, 3, 32, 32), 0.5)
    size = rival.small.config.image_size
    assert size != (32, 32)
    torch.testing.assert_close(rival(flat), rival.small(torch.full((1, 3, *size), 0.5)), atol=1e-4, rtol=1e-4)
