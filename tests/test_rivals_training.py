"""eval/rivals/train.py and what it trains: DTEM's relaxed merging, the shallower tower, the search for rates."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tower
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from eval.rivals import NotGiven, build, calibrated, diffrate, dtem, rates, tome
from eval.rivals.dtem_soft import soft_features, soft_match
from eval.rivals.train import METHODS, RivalTrainConfig, check, main, plans, train
from patchrank.errors import UserError
from patchrank.loading import load_clip
from patchrank.macs import dense_macs
from patchrank.tower import VisionTower
from predictors.calibration import small_parameters


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A flat folder of 32 pictures."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(32):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def config(model: Path, pictures: Path, tmp_path: Path) -> RivalTrainConfig:
    data = dict(data="folder", data_root=pictures, split="all", limit=24, held_out=8, judged=8)
    small = dict(batch_size=8, num_steps=6, save_every=3, threads=1, num_searched=8)
    return RivalTrainConfig(model=str(model), out=tmp_path / "out", lr=3e-3, **data, **small)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def embedding_of(tower: VisionTower, seed: int = 0) -> dtem.Embedding:
    """An embedding with random weights."""
    torch.manual_seed(seed)
    return dtem.Embedding(tower.config)


# DTEM


def test_an_untrained_embedding_is_tome(images: Tensor) -> None:
    tower, r = make_tower(num_layers=6), {0: 4, 2: 3}
    with torch.no_grad():
        start = dtem.Embedding(tower.config).start_from_keys(tower)
        found = dtem.DTEM(tower, r, embedding=start)(images)
        torch.testing.assert_close(found, tome.ToMe(tower, r)(images), atol=1e-4, rtol=1e-4)
        other = dtem.DTEM(tower, r, embedding=embedding_of(tower))(images)
    assert not torch.allclose(found, other, atol=1e-3)


@pytest.mark.parametrize("changes", [dict(), dict(num_prefix=5), dict(num_prefix=0, pool="mean")])
def test_relaxed_merging_becomes_what_inference_does(changes: dict, images: Tensor) -> None:
    tower, r = make_tower(num_layers=6, **changes), {0: 4, 1: 3, 4: 2}
    embedding = embedding_of(tower)
    with torch.no_grad():
        hard = dtem.DTEM(tower, r, embedding=embedding)(images)
        cold, warm = (soft_features(tower, embedding, r, tower.embed(images), softness) for softness in (1e-5, 0.1))
    torch.testing.assert_close(cold, hard, atol=5e-3, rtol=5e-3)
    assert (warm - hard).norm() > 10 * (cold - hard).norm()
    soft_features(tower, embedding, r, tower.embed(images)).square().sum().backward()
    for name, layer in embedding.layers.items():
        touched = layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
        assert touched == (int(name) in r), "every merging block's embedding learns, no other"
    assert all(parameter.grad is None for parameter in tower.parameters())


@settings(max_examples=20)
@given(num_patches=st.integers(4, 13), num_prefix=st.integers(0, 3), share=st.floats(0, 1), seed=st.integers(0, 9999))
def test_gates_and_hosts_are_the_matching(num_patches: int, num_prefix: int, share: float, seed: int) -> None:
    r = max(1, round(share * (num_patches // 2)))
    metric_BLM = draw(2, num_prefix + num_patches, 4, seed=seed)
    with torch.no_grad():
        (merged_BR, _, host_BR), gate_BA, host_BAX = soft_match(metric_BLM, r, num_prefix, 0.03)
    merged_BA = torch.zeros_like(gate_BA).scatter(1, merged_BR, 1.0)
    torch.testing.assert_close((gate_BA - 0.5).sign() * (merged_BA - 0.5).sign(), torch.ones_like(gate_BA))
    assert torch.equal(host_BAX.argmax(-1).gather(1, merged_BR), host_BR)
    assert (gate_BA[:, : (num_prefix + 1) // 2] < 1e-6).all(), "prefix tokens stay"
    assert (host_BAX[:, (num_prefix + 1) // 2 :, : num_prefix // 2] < 1e-6).all(), "and take nothing in"
    torch.testing.assert_close(host_BAX.sum(-1), torch.ones_like(host_BAX[..., 0]))


def test_embeddings_of_other_towers_are_refused(tmp_path: Path) -> None:
    tower = make_tower(num_layers=6)
    dtem.save(tmp_path / dtem.FILE, dtem.Embedding(tower.config), "c" * 64)
    with pytest.raises(UserError, match=r"is no embedding for this tower .made for weights cccc"):
        build("dtem", tower, 0.7, {"dtem": tmp_path})


def test_training_draws_merges_within_the_range() -> None:
    tower = make_tower(num_layers=6)
    found = plans(tower, (0.6, 0.8))
    shares = [tome.tome_macs(tower.config, plan) / dense_macs(tower.config) for plan in found]
    assert 0.6 <= min(shares) and max(shares) <= 0.8 and len({tuple(plan) for plan in found}) >= 3
    with pytest.raises(UserError, match=r"--macs-range 0.01 0.02: no merging"):
        plans(tower, (0.01, 0.02))


# DiffRate's search


def test_mutations_stay_in_range_and_the_search_never_loses(images: Tensor) -> None:
    tower = make_tower(num_layers=6)
    rng, schedule = np.random.default_rng(0), diffrate.equal(tower.config)
    for _ in range(50):
        changed = rates.mutated(schedule, rng, 0.5)
        assert changed != schedule
        schedule = changed
        assert all(0 < keep < 1 for keep in schedule.keep) and all(0 <= share <= 1 for share in schedule.merged)
    with torch.no_grad():
        x_nLC, dense_nD = tower.embed(images), tower(images)
        best, values = rates.search(tower, 0.6, x_nLC, dense_nD, num_steps=25, seed=0)
        assert rates.cosine_of(tower, 0.6, best, x_nLC, dense_nD) == pytest.approx(values[-1])
        again = rates.search(tower, 0.6, x_nLC, dense_nD, num_steps=25, seed=0)
    assert values == sorted(values) and values[-1] > values[0] and again == (best, values)


# The command


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_file_that_its_row_reads(method: str, config: RivalTrainConfig, capsys) -> None:
    main(replace(config, method=method))
    report = json.loads((config.out / f"{method}_results.json").read_text())
    assert report["cosine"] >= report["cosine_before"] - (0.05 if method == "diffrate" else 1e-6)
    assert report["num_held_out"] == 8 and report["settings"]["method"] == method and "torch" in report["versions"]
    clip = load_clip(config.model)
    row, needs = ("tome-calibrated", "calibrated-rivals") if method == "calibrate" else (method, method)
    rival = build(row, clip.tower, 0.7, {needs: config.out})
    assert rival(draw(1, 3, 32, 32)).shape == (1, 24)
    assert f"{method}: cosine" in capsys.readouterr().out


def test_a_shallow_tower_learns_and_goes_on_where_it_stopped(config: RivalTrainConfig) -> None:
    clip = load_clip(config.model)
    config = replace(config, method="shallow", num_steps=12)
    report = train(config, clip)
    assert report["depth"] == 4 and report["cosine"] > report["cosine_before"]
    again = train(config, clip)
    assert again["cosine"] == report["cosine"] and again["log"] == report["log"]
    with pytest.raises(UserError, match=r"holds a run with --lr 0\.003"):
        train(replace(config, lr=1e-3), clip)


def test_several_processes_are_refused_before_each_does_all_the_work(config: RivalTrainConfig, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE=2: this command is one process; start it without torchrun"):
        main(replace(config, method="dtem"))
    assert not config.out.exists()


@pytest.mark.parametrize("name", ["mlerp-2-10", "evit", "drop-checkerboard"])
def test_calibration_changes_small_parameters_of_a_copy(name: str, config: RivalTrainConfig) -> None:
    clip = load_clip(config.model)
    before = {key: value.clone() for key, value in clip.tower.state_dict().items()}
    report = train(replace(config, method="calibrate", rival=name), clip)
    assert report["cosine"] >= report["cosine_before"] and report["rival"] == name
    assert all(torch.equal(value, before[key]) for key, value in clip.tower.state_dict().items())
    rival = build(f"{name}-calibrated", clip.tower, 0.7, {"calibrated-rivals": config.out})
    changed = {key for key, value in rival.tower.state_dict().items() if not torch.equal(value, before[key])}
    small = small_parameters(clip.tower, rival.first_layer, "biases")
    assert changed <= small.keys() and len(changed) > 10
    assert rival.macs == build(name, clip.tower, 0.7).macs
    with pytest.raises(UserError, match=f"no calibration of {name} for this budget; make one: .*--rival {name} --macs"):
        build(f"{name}-calibrated", clip.tower, 0.6, {"calibrated-rivals": config.out})
    calibrated.file_of(config.out, name, 0.65).write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"is no calibration of {name} .*--rival {name} --macs 0.65"):
        build(f"{name}-calibrated", clip.tower, 0.65, {"calibrated-rivals": config.out})


def test_a_rival_is_calibrated_with_low_rank_corrections_in_a_row_of_its_own(config: RivalTrainConfig) -> None:
    clip, config = load_clip(config.model), replace(config, method="calibrate", rival="tome", num_steps=12)
    plain, corrected = replace(config, out=config.out / "0"), replace(config, out=config.out / "2", lora_rank=2)
    assert train(corrected, clip)["cosine"] > train(plain, clip)["cosine_before"]
    rival = build("tome-lora", clip.tower, 0.7, {"lora-rivals": corrected.out})
    now, source = rival.tower.state_dict(), clip.tower.state_dict()
    assert now.keys() == source.keys()
    change_OI = now["blocks.2.fc1.weight"] - source["blocks.2.fc1.weight"]
    assert torch.linalg.matrix_rank(change_OI, rtol=1e-4) == 2
    assert rival.macs == build("tome", clip.tower, 0.7).macs and rival.trained_on.endswith("12 steps, rank 2")
    with pytest.raises(UserError, match="was made with --lora-rank 2"):
        build("tome-calibrated", clip.tower, 0.7, {"calibrated-rivals": corrected.out})
    with pytest.raises(UserError, match=r"was made with --lora-rank 0\); make one: .* --lora-rank 4 --rival tome"):
        build("tome-lora", clip.tower, 0.7, {"lora-rivals": plain.out})


def test_a_learned_rival_is_calibrated_with_its_own_file(config: RivalTrainConfig) -> None:
    clip, again = load_clip(config.model), replace(config, method="calibrate", rival="dtem")
    train(replace(config, method="dtem"), clip)
    with pytest.raises(NotGiven, match="dtem: skipped, needs a trained embedding"):
        train(again, clip)
    train(replace(again, files=(f"dtem={config.out}",)), clip)
    files = {"dtem": config.out, "calibrated-rivals": config.out}
    plain, fitted = (build(name, clip.tower, 0.7, files) for name in ("dtem", "dtem-calibrated"))
    image_BCHW = draw(2, 3, 32, 32)
    assert fitted.macs == plain.macs and not torch.equal(fitted(image_BCHW), plain(image_BCHW))
    assert plain.trained_on is None
    assert fitted.trained_on == f"folder all, {config.limit or 'all'} images, no labels, {config.num_steps} steps"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(method="tome"), "--method tome: unknown; choose one of dtem, shallow, diffrate, calibrate"),
        (dict(macs_range=(0.9, 0.5)), "--macs-range 0.9 0.5: must rise"),
        (dict(rival="shallow"), "--rival shallow: cannot be calibrated; choose one of tome"),
        (dict(method="calibrate", rival="dtem"), "--rival dtem: give --files dtem=path, a trained embedding: python"),
        (dict(files=("dtem",)), "--files dtem: must be name=path"),
        (dict(macs=1.2), "--macs 1.2: must lie in"),
        (dict(num_searched=0), "--num-searched 0: must be 1 or more"),
        (dict(lora_rank=-1), "--lora-rank -1: must be 0 or more"),
    ],
)
def test_bad_flags_are_one_line(config: RivalTrainConfig, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(replace(config, **changes))


@pytest.mark.system
def test_dtem_learns_on_the_embedded_model(tmp_path: Path) -> None:
    short = dict(limit=320, held_out=100, num_steps=60, save_every=20, macs=0.5, out=tmp_path)
    report = train(RivalTrainConfig(**short), load_clip())
    assert report["cosine"] > report["cosine_before"]
