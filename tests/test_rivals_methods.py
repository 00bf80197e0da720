"""eval/rivals: ToFu, PiToMe, VisionZip, DiffRate, A-ViT, shallow, golden and trained rows against slow references."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from hypothesis import given, settings
from hypothesis import strategies as st
from made_files import make_store, make_trained
from torch import Tensor

from eval.rivals import (
    avit,
    build,
    covering,
    diffrate,
    evit,
    pitome,
    shallow,
    tofu,
    tome,
    trained,
    visionzip,
)
from eval.rivals.walk import Step
from patchrank.errors import UserError
from patchrank.macs import dense_macs
from patchrank.pruned import PrunedTower
from patchrank.scorers import PositionPrior, mean_rank_prior
from patchrank.search.store import RankingMismatch, open_store
from patchrank.tower import VisionTower
from predictors import load_pruned


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture
def tower() -> VisionTower:
    return make_tower(num_layers=6)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step_of(tower: VisionTower, layer: int, images: Tensor, size_BL: Tensor | None = None) -> Step:
    """Where a walk stands behind the attention of block `layer` if nothing has left before."""
    before_BLC = tower.run(tower.embed(images), 0, layer)
    x_BLC, key_BLC = tower.blocks[layer].attend(before_BLC)
    return Step(layer, tower.blocks[layer], before_BLC, x_BLC, key_BLC, size_BL, tower.config.num_prefix)


# ToMe beyond one class token and one round


def test_one_shot_matches_again_where_half_is_not_enough(tower: VisionTower, images: Tensor) -> None:
    assert tome.rounds(16, 11) == [8, 3] and tome.rounds(16, 8) == [8] and tome.rounds(5, 9) == [2, 1, 1]
    step = step_of(tower, 1, images)
    x_BLC, size_BL, metric_BLM = step.x_BLC, torch.ones(3, 17), step.key_BLC.unflatten(-1, (4, 8)).mean(2)
    for r in (8, 3):
        matched = tome.match(metric_BLM, r, 1)
        metric_BLM = tome.merge(metric_BLM, size_BL, matched)[0]
        x_BLC, size_BL = tome.merge(x_BLC, size_BL, matched)
    found_BLC, found_size_BL = tome.ToMe(tower, {1: 11}).reduce(step)
    torch.testing.assert_close(found_BLC, x_BLC)
    assert torch.equal(found_size_BL, size_BL) and found_BLC.shape[1] == 6
    assert len(build("tome-one-shot", tower, 0.5).left) == 1


def test_registers_are_never_merged_in_any_block(images: Tensor) -> None:
    tower = make_tower(num_prefix=5, num_layers=6)
    x_BLC = torch.arange(21.0).view(1, 21, 1)
    metric_BLM, size_BL = draw(1, 21, 3), torch.ones(1, 21)
    for r in (4, 3, 2):
        matched = tome.match(metric_BLM, r, 5)
        metric_BLM = tome.merge(metric_BLM, size_BL, matched, 5)[0]
        x_BLC, size_BL = tome.merge(x_BLC, size_BL, matched, 5)
        assert x_BLC[0, :5, 0].tolist() == [0, 1, 2, 3, 4] and size_BL[0, :5].eq(1).all()
    tokens_BLC, size_BL = tome.ToMe(tower, {0: 4, 1: 4, 2: 3}).tokens(tower.embed(images))
    assert size_BL[:, :5].eq(1).all() and size_BL.sum(1).eq(21).all() and tokens_BLC.isfinite().all()


# ToFu


def test_tofu_prunes_below_and_merges_above(tower: VisionTower, images: Tensor) -> None:
    step, size_BL = step_of(tower, 2, images), torch.ones(3, 17)
    matched = tome.match(step.block.mean_head(step.key_BLC), 5, 1)
    rival = tofu.ToFu(tower, {2: 5, 3: 5})
    pruned_BLC, pruned_size_BL = rival.join(2, step.x_BLC, size_BL, matched)
    merged_BR, left_BU, _ = matched
    for image in range(3):
        a_side = [step.x_BLC[image, 2 * index] for index in left_BU[image]]
        b_side = list(step.x_BLC[image, 1::2])
        torch.testing.assert_close(pruned_BLC[image], torch.stack(a_side + b_side))
    assert pruned_size_BL.eq(1).all() and pruned_size_BL.shape == (3, 12)
    merged_BLC, merged_size_BL = rival.join(3, step.x_BLC, size_BL, matched)
    expected_BLC, expected_size_BL = tofu.mlerp(step.x_BLC, size_BL, matched, 1)
    assert torch.equal(merged_BLC, expected_BLC) and torch.equal(merged_size_BL, expected_size_BL)
    assert merged_size_BL.sum(1).eq(17).all() and len(merged_BR[0]) == 5


@settings(max_examples=15)
@given(num_tokens=st.integers(4, 14), share=st.floats(0, 1), seed=st.integers(0, 10_000))
def test_mlerp_is_the_mean_direction_at_the_largest_norm(num_tokens: int, share: float, seed: int) -> None:
    r = round(share * ((num_tokens - 1) // 2))
    x_BLC = draw(1, num_tokens, 5, seed=seed)
    size_BL = torch.randint(1, 5, (1, num_tokens), generator=torch.Generator().manual_seed(seed)).float()
    matched = tome.match(draw(1, num_tokens, 3, seed=seed + 1), r, 1)
    merged_BR, left_BU, host_BR = (part[0].tolist() for part in matched)
    found_BLC, _ = tofu.mlerp(x_BLC, size_BL, matched, 1)
    b_side = list(range(1, num_tokens, 2))
    for place, b in enumerate(b_side):
        members = [b] + [2 * a for a, host in zip(merged_BR, host_BR) if b_side[host] == b]
        mean = sum(x_BLC[0, i] * size_BL[0, i] for i in members)
        norm = max(x_BLC[0, i].norm() for i in members)
        torch.testing.assert_close(found_BLC[0, len(left_BU) + place], mean / mean.norm() * norm, atol=1e-4, rtol=1e-4)


# PiToMe


@settings(max_examples=25)
@given(
    num_patches=st.integers(2, 13),
    share=st.floats(0, 1),
    margin=st.floats(0, 0.9),
    protect=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_pitome_pairs_as_the_loops_do(num_patches: int, share: float, margin: float, protect: bool, seed: int) -> None:
    K = max(1, round(share * (num_patches // 2)))
    unit_NM = F.normalize(draw(num_patches, 3, seed=seed), dim=-1)
    cosine = (unit_NM @ unit_NM.T).tolist()
    energies = [sum(c - margin if c >= margin else math.exp(c - margin) - 1 for c in row) for row in cosine]
    order = sorted(range(num_patches), key=lambda i: -energies[i])
    if min((energies[i] - energies[j] for i, j in itertools.pairwise(order)), default=1) < 1e-5:
        return  # a tie in rounding
    taking_part = order[: 2 * K] if protect else order
    a, b = taking_part[::2], taking_part[1::2]
    host_of = {i: max(b, key=lambda j: cosine[i][j]) for i in a}
    merged = sorted(a, key=lambda i: -cosine[i][host_of[i]])[:K]
    guest, hosts, place, others = (
        part[0].tolist() for part in pitome.pairs((unit_NM @ unit_NM.T)[None], K, margin, protect=protect)
    )
    assert hosts == b and sorted(others) == sorted(set(order) - set(merged) - set(b))
    assert {i: hosts[at] for i, at in zip(guest, place)} == {i: host_of[i] for i in merged}


def test_pitome_merges_the_crowd_and_spares_the_lonely(tower: VisionTower, images: Tensor) -> None:
    left = pitome.left_after(tower.config, 0.8)
    assert left == {0: 13, 1: 10, 2: 8, 3: 7, 4: 5}, "0.8 of what is there, never the last block"
    for layer, protect in ((1, False), (3, True)):
        step = step_of(tower, layer, images)
        tokens_BLC, size_BL = pitome.PiToMe(tower, {layer: 13}).reduce(step)
        assert tokens_BLC.shape == (3, 14, 32) and size_BL.sum(1).eq(17).all()
        metric_NM = F.normalize(step.block.mean_head(step.key_BLC[0, 1:]), dim=-1)
        pairs = pitome.pairs((metric_NM @ metric_NM.T)[None], 3, 0.75 * (1 - layer / 6), protect=protect)
        guest, hosts, place, others = (part[0].tolist() for part in pairs)
        assert len(hosts) == (3 if protect else 8)
        rows = [step.x_BLC[0, 1 + i] for i in others]
        for number, host in enumerate(hosts):
            members = [host] + [i for i, at in zip(guest, place) if at == number]
            rows.append(step.x_BLC[0, [1 + i for i in members]].mean(0))
        torch.testing.assert_close(tokens_BLC[0], torch.stack([step.x_BLC[0, 0], *rows]))


# VisionZip


def test_visionzip_is_the_attended_and_the_gathered_others(tower: VisionTower, images: Tensor) -> None:
    assert visionzip.split(64) == (54, 10) and visionzip.split(2) == (1, 1)
    assert visionzip.targets(11, 3) == [0, 3, 6] and visionzip.targets(3, 3) == [0, 1, 2]
    step, K = step_of(tower, 1, images), 12
    num_dominant, num_targets = visionzip.split(K)
    tokens_BLC, size_BL = visionzip.VisionZip(tower, 1, K).reduce(step)
    assert tokens_BLC.shape == (3, 13, 32) and size_BL is None
    attention_BN = evit.class_row(step.block, step.before_BLC, step.key_BLC)[:, 1:]
    for image in range(3):
        order = sorted(range(16), key=lambda i: -attention_BN[image, i].item())
        rest = sorted(order[num_dominant:])
        chosen = rest[:: len(rest) // num_targets][:num_targets]
        keys = step.block.mean_head(step.key_BLC[image, 1:])
        groups = {target: [] for target in chosen}
        for i in rest:
            if i not in chosen:
                groups[max(chosen, key=lambda t: F.cosine_similarity(keys[i], keys[t], dim=0).item())].append(i)
        patches = step.x_BLC[image, 1:]
        rows = [patches[i] for i in order[:num_dominant]]
        rows += [patches[i] + (patches[group].mean(0) if group else 0) for i, group in groups.items()]
        torch.testing.assert_close(tokens_BLC[image, 1:], torch.stack(rows))


# DiffRate


def test_diffrate_prunes_the_last_and_merges_those_before(tower: VisionTower, images: Tensor) -> None:
    size_BL = torch.ones(3, 17)
    size_BL[:, 1:] = torch.arange(1.0, 17.0)
    step = step_of(tower, 2, images, size_BL)
    tokens_BLC, found_BL = diffrate.DiffRate(tower, {2: (8, 3)}).reduce(step)
    q, k, _ = (
        part.unflatten(-1, (4, 8)).transpose(1, 2)
        for part in step.block.qkv(step.block.norm1(step.before_BLC)).chunk(3, -1)
    )
    attention_BN = (q @ k.mT / 8**0.5 + size_BL.log()[:, None, None]).softmax(-1).mean(1)[:, 0, 1:]
    for image in range(3):
        order = sorted(range(16), key=lambda i: -attention_BN[image, i].item())
        kept, merged, patches = order[:8], order[8:11], step.x_BLC[image, 1:]
        groups, sizes = {i: [i] for i in kept}, {i: float(i + 1) for i in kept}
        for i in merged:
            cosines = {j: F.cosine_similarity(patches[i], patches[j], dim=0).item() for j in kept}
            host = max(cosines, key=cosines.__getitem__)
            groups[host].append(i)
            sizes[host] += max(0.0, cosines[host]) * (i + 1)
        expected = torch.stack([patches[group].mean(0) for group in groups.values()])
        torch.testing.assert_close(tokens_BLC[image, 1:], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found_BL[image, 1:], torch.tensor(list(sizes.values())))


def test_diffrate_schedules_scale_and_are_checked(tower: VisionTower, tmp_path: Path) -> None:
    assert diffrate.compressed_layers(tower.config) == (1, 2, 3, 4), "as published, the first block is left whole"
    schedule = diffrate.Schedule((0.5, 1.0, 0.5, 1.0), (0.0, 0.0, 1.0, 0.0))
    assert diffrate.counts(tower.config, schedule, 0.25) == {1: (8, 0), 3: (4, 4)}
    assert diffrate.counts(tower.config, schedule, 1 / 16) == {1: (4, 0), 3: (1, 3)}
    (tmp_path / diffrate.FILE).write_text('{"schedule": {"keep": [0.9], "merged": [0.5]}}')
    with pytest.raises(UserError, match=r"is no schedule for this tower .must hold 4 ratios"):
        diffrate.read_schedule(tmp_path, tower.config)


# A-ViT


def test_avit_halts_by_the_accumulated_score(tower: VisionTower, images: Tensor) -> None:
    spec = avit.spec_at(tower.config, 0.8)
    K_of = dict(spec.counts(16))
    assert K_of == {1: 13, 2: 10, 3: 8, 4: 7, 5: 5}
    for image in range(3):
        x_LC = tower.embed(images[image : image + 1])
        totals = [0.0] * 16
        for layer in range(5):
            x_LC = tower.blocks[layer](x_LC)
            totals = [t + 1 / (1 + math.exp(10 - 5 * x.item())) for t, x in zip(totals, x_LC[0, 1:, 0])]
            kept = sorted(range(len(totals)), key=totals.__getitem__)[: K_of[layer + 1]]
            x_LC, totals = x_LC[:, [0] + [1 + i for i in kept]], [totals[i] for i in kept]
        expected = tower.finish(x_LC, 5)
        found = avit.AViT(tower, spec)(images[image : image + 1])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# A shallower tower


def test_a_student_starts_as_evenly_spaced_blocks(tower: VisionTower, images: Tensor) -> None:
    assert shallow.source_blocks(12, 8) == [0, 2, 3, 5, 6, 8, 9, 11] and shallow.source_blocks(6, 1) == [0]
    small = shallow.student(tower, 3)
    x_BLC = tower.embed(images)
    for layer in shallow.source_blocks(6, 3):
        x_BLC = tower.blocks[layer](x_BLC)
    torch.testing.assert_close(small(images), tower.head(x_BLC), atol=1e-5, rtol=1e-4)
    for macs in (0.3, 0.7, 1.0):
        depth = shallow.depth_for(tower.config, macs)
        costs = {d: dense_macs(shallow.student(tower, d).config) / dense_macs(tower.config) for d in range(1, 7)}
        assert abs(costs[depth] - macs) == min(abs(cost - macs) for cost in costs.values())


def test_students_of_other_towers_are_refused(tower: VisionTower, tmp_path: Path) -> None:
    shallow.save(tmp_path, shallow.student(tower, 4), "b" * 64)
    with pytest.raises(UserError, match=r"shallow_4.* is no student of this tower .made for weights bbbb"):
        build("shallow", tower, 0.7, {"shallow": tmp_path})


# Golden


def test_golden_rankings_beat_chance(tower: VisionTower, images: Tensor) -> None:
    oracle, dense_BD = build("golden-drop", tower, 0.7), tower(images[:1])
    best = F.cosine_similarity(oracle(images[:1]), dense_BD)
    draws = [torch.rand(1, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(12)]
    assert best > max(F.cosine_similarity(oracle(images[:1], score_BN), dense_BD) for score_BN in draws)


# Rows of files


def test_mean_rank_is_the_stores_prior_and_wants_train_images(
    tower: VisionTower, images: Tensor, tmp_path: Path
) -> None:
    path = make_store(tmp_path / "train", tower)
    rival = build("drop-mean-rank", tower, 0.7, {"mean-rank": path})
    prior = PositionPrior(mean_rank_prior(open_store(path).order_BN))
    expected = PrunedTower(tower, covering.one_cut(tower.config, 0.7, "drop"), prior)
    assert torch.equal(rival(images), expected(images))
    with pytest.raises(RankingMismatch, match="ranks the split val"):
        build("fold-mean-rank", tower, 0.7, {"mean-rank": make_store(tmp_path / "val", tower, split="val")})
    with pytest.raises(RankingMismatch, match="made with weights"):
        build("fold-mean-rank", make_tower(seed=1, num_layers=6), 0.7, {"mean-rank": path})


def test_trained_rows_are_the_saved_tower_at_other_counts(tower: VisionTower, images: Tensor, tmp_path: Path) -> None:
    path = make_trained(tmp_path, tower)
    saved = load_pruned(path)
    rival = trained.build(tower, 0.7, path)
    assert [layer for layer, _ in rival.pruned.spec.cuts] == [layer for layer, _ in saved.spec.cuts]
    expected = PrunedTower(tower, rival.pruned.spec, saved.scorer)
    torch.testing.assert_close(rival(images), expected(images))
    assert rival.macs_share <= 0.7
    with pytest.raises(UserError, match="was trained for weights"):
        trained.build(make_tower(seed=1, num_layers=6), 0.7, path)
