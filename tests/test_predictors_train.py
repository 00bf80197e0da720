"""`python -m predictors.train` and `.calibrate` end to end on a tiny saved model: numbers, labels, resume, errors."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tower
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_clip import save_tiny_clip
from torch import nn

import predictors
from patchrank import cli
from patchrank.checkpoints.weights import weights_hash
from patchrank.errors import UserError
from patchrank.loading import LoadedClip, load_clip
from patchrank.macs import dense_macs, pruned_macs
from patchrank.pretrain.journal import read_log
from patchrank.pruned import PrunedTower, start_state
from patchrank.scorers import SCORERS
from patchrank.search import search
from patchrank.spec import WHERES, PruneSpec
from predictors import artifact, fit, lora
from predictors.calibrate import calibrate
from predictors.calibrate import main as calibrate_main
from predictors.calibration import behind, calibratable, small_parameters
from predictors.config import CalibrateConfig, TrainConfig, check_train
from predictors.costs import share_of_macs
from predictors.fit import STATE, Course, Task
from predictors.readout import STRENGTHS
from predictors.tables import PREDICTORS
from predictors.train import main as train_main
from predictors.train import train

GOLDEN = "distill:1,listwise:0.3,pairwise:0.1,bce:0.1"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A CLIP of 16 patches and 4 blocks with random weights."""
    return save_tiny_clip(tmp_path_factory.mktemp("model") / "tiny", num_layers=4)


def draw(folder: Path, num: int) -> None:
    """Two classes of coarse random pictures."""
    for number in range(num):
        path = folder / ("cat", "dog")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 40), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes of twelve pictures, and one file that is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder, 24)
    (folder / "cat" / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def clip(model: Path) -> LoadedClip:
    return load_clip(str(model))


@pytest.fixture
def config(model: Path, pictures: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model),
        data="folder",
        data_root=pictures,
        split="all",
        keep=0.4,
        layer=1,
        held_out=8,
        num_steps=4,
        batch_size=4,
        save_every=2,
        out=tmp_path / "train",
    )


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def bits(folder: Path) -> bytes:
    return (folder / "pruned.safetensors").read_bytes()


def test_training_lowers_the_held_out_distance_and_freezes_the_tower(config: TrainConfig, clip: LoadedClip) -> None:
    pruned = train(replace(config, num_steps=30, save_every=10, lr=0.02, metric_dim=8), clip)
    report = results(config.out)
    untrained = report["before"]["distance"]
    assert report["held_out"]["distance"] < report["log"][0]["held_out"]["distance"] or report["steps"] == 10
    assert report["best_aim"] == pytest.approx(report["held_out"]["distance"], abs=1e-5)
    assert report["held_out"]["distance"] < untrained, "a trained scorer should beat a random one on 7 pictures"
    assert report["mode"] == "frozen" and weights_hash(pruned.tower) == clip.weights_hash
    assert report["num_held_out"] + report["num_train"] == 24
    assert report["macs_share"] == pytest.approx(share_of_macs(pruned))
    for entry in report["log"]:
        assert entry["relaxed"] > 0 and entry["hard"] > 0
    low, high = report["cosine_gain"]["ci95"]
    assert low <= report["cosine_gain"]["mean"] <= high


def test_a_loaded_tower_gives_identical_features(config: TrainConfig, clip: LoadedClip, images) -> None:
    config = replace(config, added="summary", num_added=2, metric_dim=4, num_steps=2)
    pruned = train(config, clip)
    loaded = predictors.load_pruned(config.out)
    with torch.no_grad():
        assert torch.equal(loaded(images), pruned(images))
    assert loaded.spec == pruned.spec and loaded.spec.num_added == 2
    state = start_state(clip.tower, clip.tower.embed(images), 1)
    assert torch.equal(loaded.nearness(state), pruned.scorer.metric(state))


@pytest.mark.parametrize("scorer", PREDICTORS)
@pytest.mark.parametrize("rest", ["fold", "drop"])
def test_every_scorer_trains_with_both_rests(scorer: str, rest: str, config: TrainConfig, clip: LoadedClip) -> None:
    pruned = train(replace(config, scorer=scorer, rest=rest, select="topk", num_steps=2), clip)
    assert pruned.spec.rest == rest
    assert results(config.out)["held_out"]["cosine"] > 0


def steps_on_disk(folder: Path) -> list[int]:
    with safe_open(str(folder / STATE), "pt") as file:
        return [entry["step"] for entry in json.loads(file.metadata()["progress"])["log"]]


class Killed(Exception):
    """Stands for kill -9."""


@contextmanager
def killed_at(number: int, monkeypatch) -> Iterator[None]:
    """Training that dies before that step, as if it were killed."""
    step = fit._step

    def dying(task, optimiser, at, rate, folder):
        if at == number:
            raise Killed
        return step(task, optimiser, at, rate, folder)

    with monkeypatch.context() as patched:
        patched.setattr(fit, "_step", dying)
        yield


@pytest.mark.parametrize("parts", [dict(), dict(added="static", metric_dim=4, loss="distill:1,error:0.5")])
def test_killed_and_resumed_gives_the_same_bytes(parts, config, clip, tmp_path, monkeypatch) -> None:
    config = replace(config, num_steps=6, **parts)
    train(config, clip)
    again = replace(config, out=tmp_path / "again")
    with killed_at(5, monkeypatch), pytest.raises(Killed):
        train(again, clip)
    assert not (again.out / "pruned.json").exists() and steps_on_disk(again.out) == [2, 4]
    train(again, clip)
    assert bits(config.out) == bits(again.out)
    strip = ("seconds", "command", "settings")
    first, second = ({k: v for k, v in results(out).items() if k not in strip} for out in (config.out, again.out))
    for log in (first["log"], second["log"]):  # means since the last state: those of the interrupted stretch are whole
        assert [entry["step"] for entry in log] == [2, 4, 6]
    assert first == second
    train(again, clip)  # complete: nothing left to do
    assert bits(config.out) == bits(again.out)


def test_another_run_in_the_same_folder_is_refused(config: TrainConfig, clip: LoadedClip) -> None:
    train(replace(config, num_steps=2), clip)
    with pytest.raises(UserError, match=r"holds a run with --lr 0\.001"):
        train(replace(config, num_steps=2, lr=0.1), clip)


def test_a_state_of_another_version_is_refused(config: TrainConfig, clip: LoadedClip) -> None:
    train(replace(config, num_steps=2), clip)
    with safe_open(str(config.out / STATE), "pt") as file:
        tensors = {name.replace("best_aim", "best_of_old"): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, str(config.out / STATE), file.metadata())
    with pytest.raises(UserError, match="holds other tensors than this version; remove it"):
        train(replace(config, num_steps=2), clip)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(config, clip, monkeypatch) -> None:
    from predictors import objective

    combine = objective.combine
    calls = []

    def sick(*args, **kwargs):
        total, terms = combine(*args, **kwargs)
        calls.append(1)
        return (total * float("nan") if len(calls) == 4 else total), terms

    monkeypatch.setattr(objective, "combine", sick)
    with pytest.raises(UserError, match=r"step 3: the loss is nan.*for the batch .*\.png.*last good weights"):
        train(config, clip)
    assert steps_on_disk(config.out) == [2]
    monkeypatch.setattr(objective, "combine", combine)
    train(config, clip)
    assert results(config.out)["steps"] == 4


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    weight = torch.nn.Linear(1, 1)
    distances = iter([1.0, 0.5, 0.6, 0.7, 0.1])
    task = Task(
        learned=weight,
        loss=lambda step: (weight.weight.square().sum(), {}),
        judge=lambda: {"distance": next(distances)},
        batch_name=str,
    )
    found = fit.fit(task, Course(num_steps=10, lr=0.1, save_every=1, patience=2), tmp_path, {})
    assert found["steps"] == 3 and found["best_aim"] == 0.5


def test_golden_rankings_from_a_store(config: TrainConfig, clip: LoadedClip, pictures: Path, tmp_path: Path) -> None:
    settings = dict(data="folder", data_root=pictures, layer=1, strategy="sweep", threads=1, limit=None)
    store = search(clip, out=tmp_path / "store", rest="fold", **settings)
    config = replace(config, store=tmp_path / "store", loss=GOLDEN, select="topk")
    train(config, clip)
    report = results(config.out)
    assert report["num_train"] == 17 and {"distill", "listwise", "pairwise", "bce"} <= report["log"][0].keys()
    assert report["log"][-1]["listwise"] > 0 and len(store.ids) == 24
    alone = replace(config, loss="listwise", out=tmp_path / "alone")
    train(alone, clip)
    assert "hard" not in results(alone.out)["log"][0]
    for change, words in (
        (dict(layer=2), "made for layer 1, not 2"),
        (dict(rest="drop"), "searched with --rest fold"),
        (dict(model=None), "made with weights"),
    ):
        other = clip
        if "model" in change:
            other, change = replace(clip, weights_hash="0" * 64), {}
        with pytest.raises(UserError, match=words):
            train(replace(config, out=tmp_path / "other", **change), other)


def test_own_cuts_stand_where_the_flag_says(config: TrainConfig, clip: LoadedClip) -> None:
    config = replace(config, keep=None, layer=None, cuts="1:10,2:6", num_steps=1)
    pruned = {where: train(replace(config, where=where, out=config.out / str(where)), clip) for where in WHERES}
    assert [one.spec.where for one in pruned.values()] == list(WHERES)
    assert [one.spec.counts(16) for one in pruned.values()] == [[(1, 10), (2, 6)]] * 2
    assert share_of_macs(pruned["before"]) < share_of_macs(pruned["inside"])
    assert train(replace(config, out=config.out / "unsaid"), clip).spec.where == "before"


def test_macs_count_the_scorer_and_the_metric(config: TrainConfig, clip: LoadedClip) -> None:
    config = replace(config, keep=None, layer=None, macs=0.75, metric_dim=4, added="summary", num_steps=2)
    pruned = train(config, clip)
    assert share_of_macs(pruned) <= 0.75 and pruned.spec.num_added == 1 and len(pruned.spec.cuts) > 1
    bare = pruned_macs(pruned.config, pruned.spec, metric_dim=4) / dense_macs(pruned.config)
    assert results(config.out)["macs_share"] > bare


def test_the_closing_table(config: TrainConfig, clip: LoadedClip) -> None:
    config = replace(config, added="static", table=4, table_keep=(0.6, 0.4), num_steps=2)
    train(config, clip)
    rows = results(config.out)["table"]
    methods = {"trained", "trained + tokens", *SCORERS}
    assert {(row["method"], row["rest"]) for row in rows} == {(m, rest) for m in methods for rest in ("fold", "drop")}
    assert len(rows) == 2 * 2 * len(methods)
    assert all(0 < row["macs_share"] < 1.2 and row["numbers"]["cosine"] <= 1 for row in rows)


@pytest.fixture(scope="module")
def trained(model, pictures, clip, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "train"
    settings = dict(data="folder", data_root=pictures, split="all", keep=0.15, layer=1, held_out=8, num_steps=2)
    train(TrainConfig(model=str(model), batch_size=4, save_every=2, scorer="linear", out=out, **settings), clip)
    return out


def calibration(trained: Path, pictures: Path, out: Path, **changes) -> CalibrateConfig:
    settings = dict(data="folder", data_root=pictures, split="all", held_out=8, batch_size=4)
    return CalibrateConfig(pruned=trained, out=out, **(settings | dict(num_steps=10, save_every=5, lr=0.002) | changes))


@pytest.mark.parametrize(("parts", "lora_rank"), [("norms", 0), ("biases", 0), ("biases", 2)])
def test_calibration_brings_features_closer_and_is_labelled(
    parts, lora_rank, trained, pictures, clip, tmp_path
) -> None:
    before = bits(trained)
    draw(tmp_path / "many", 96)  # two dozen pictures are learnt by heart
    long = dict(num_steps=60, save_every=20, lr=0.005, batch_size=8, held_out=40)
    settings = dict(parts=parts, lora_rank=lora_rank, **long)
    done = calibrate(calibration(trained, tmp_path / "many", tmp_path / "c", **settings), clip)
    report = results(tmp_path / "c")
    assert report["cosine_gain"]["ci95"][0] > 0
    assert report["log"][-1]["distill"] < report["log"][0]["distill"]
    assert report["mode"] == "calibrated" and predictors.read_training(tmp_path / "c")["mode"] == "calibrated"
    assert report["macs_share"] == report["before"]["macs_share"]
    assert bits(trained) == before and predictors.read_training(trained)["mode"] == "frozen"
    loaded = predictors.load_pruned(tmp_path / "c")
    with torch.no_grad():
        image = torch.randn(2, 3, 32, 32)
        assert torch.equal(loaded(image), done(image))
    source, now = clip.tower.state_dict(), loaded.tower.state_dict()
    changed = {name for name in source if not torch.equal(source[name], now[name])}
    linear = {f"{name}.weight" for name, module in behind(clip.tower, 1) if isinstance(module, nn.Linear)}
    allowed = set(small_parameters(clip.tower, 1, parts)) | (linear if lora_rank else set())
    assert changed == allowed, "exactly the small parameters behind the cut may change"
    for name in linear if lora_rank else ():
        assert torch.linalg.matrix_rank(now[name] - source[name], rtol=1e-4) == lora_rank
    other = replace(clip, weights_hash="0" * 64)
    with pytest.raises(UserError, match=r"made from weights .*, this model has 000000000000"):
        calibrate(calibration(tmp_path / "c", pictures, tmp_path / "d"), other)


def test_a_calibration_goes_on_at_another_budget(trained, pictures, clip, tmp_path) -> None:
    """From a calibrated tower, with the record of the frozen source; the report compares with the frozen one."""
    calibrate(calibration(trained, pictures, tmp_path / "a", num_steps=4, save_every=2), clip)
    cheaper = results(trained)["macs_share"] - 0.01
    calibrate(calibration(tmp_path / "a", pictures, tmp_path / "b", num_steps=4, save_every=2, macs=cheaper), clip)
    first, second = results(tmp_path / "a"), results(tmp_path / "b")
    assert second["macs_share"] <= cheaper < first["macs_share"] and second["mode"] == "calibrated"
    assert second["before"]["distance"] > first["before"]["distance"]
    assert predictors.read_training(tmp_path / "b")["source_weights_hash"] == clip.weights_hash


def test_tensorboard_files_are_written(trained, pictures, clip, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    short = dict(num_steps=4, save_every=2)
    calibrate(calibration(trained, pictures, tmp_path / "a", tensorboard=True, **short), clip)
    assert list((tmp_path / "a").glob("events.out.tfevents.*"))
    rows = read_log(tmp_path / "a")
    assert [row["step"] for row in rows] == [2, 4]
    log = results(tmp_path / "a")["log"]
    assert rows[1]["held_out/cosine"] == log[1]["held_out"]["cosine"] and rows[1]["distill"] == log[1]["distill"]
    calibrate(calibration(trained, pictures, tmp_path / "b", **short), clip)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")


def test_the_size_bias_is_trained_away(trained, pictures, clip, tmp_path) -> None:
    short = dict(num_steps=4, save_every=2)
    done = calibrate(calibration(trained, pictures, tmp_path / "a", size_bias=False, **short), clip)
    loaded, frozen = predictors.load_pruned(tmp_path / "a"), predictors.load_pruned(trained)
    assert not loaded.spec.size_bias and replace(loaded.spec, size_bias=True) == frozen.spec
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(image), done(image))
    assert results(tmp_path / "a")["before"]["cosine"] == pytest.approx(results(trained)["held_out"]["cosine"])
    calibrate(calibration(tmp_path / "a", pictures, tmp_path / "b", **short), clip)
    assert not predictors.load_pruned(tmp_path / "b").spec.size_bias, "what was trained away stays away"


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_calibration_resumes_bit_equal(lora_rank, trained, pictures, clip, tmp_path, monkeypatch) -> None:
    short = dict(num_steps=6, save_every=2, views=True, answers=0.3, lora_rank=lora_rank)
    calibrate(calibration(trained, pictures, tmp_path / "a", **short), clip)
    with killed_at(3, monkeypatch), pytest.raises(Killed):
        calibrate(calibration(trained, pictures, tmp_path / "b", **short), clip)
    calibrate(calibration(trained, pictures, tmp_path / "b", **short), clip)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    report = results(tmp_path / "a")
    assert report["log"][0]["answers"] > 0
    judged = [entry["held_out"]["distance"] + 0.3 * entry["held_out"]["kl"] for entry in report["log"]]
    assert report["best_aim"] <= min(judged), "the answers count in what is kept"
    assert any(report["best_aim"] == pytest.approx(one) for one in judged)


def test_calibration_is_cut_to_what_stands_behind_the_first_cut() -> None:
    tower = make_tower(pool="attention", num_prefix=0, pre_norm=True)
    names = set(small_parameters(tower, 2, "biases"))
    assert "norm.weight" in names and "pool.norm.bias" in names and "blocks.3.fc2.bias" in names
    assert not any(name.startswith(("blocks.0", "blocks.1.", "patch", "norm_pre")) for name in names)
    assert not any(name.endswith("weight") and "norm" not in name for name in names)
    assert small_parameters(tower, 2, "norms").keys() < names
    with pytest.raises(ValueError, match="norms, biases"):
        small_parameters(tower, 2, "everything")


def test_a_calibratable_copy_shares_nothing_trained_with_the_original(tower) -> None:
    pruned = PrunedTower(tower, PruneSpec(cuts=((1, 0.5),)), SCORERS["random"](tower.config.grid))
    other, small = calibratable(pruned)
    with torch.no_grad():
        for parameter in small.values():
            parameter.add_(1.0)
    assert artifact.mode(pruned, weights_hash(tower)) == "frozen"
    assert artifact.mode(other, weights_hash(tower)) == "calibrated"
    assert {id(p) for p in small.values()} == {id(p) for p in other.parameters() if p.requires_grad}


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(pool="attention", num_prefix=0), dict(pre_norm=True)])
def test_low_rank_corrections_are_nothing_at_first_and_vanish_into_the_weights(changes: dict, images) -> None:
    tower = make_tower(**changes)
    names, feature_BD = set(tower.state_dict()), tower(images[:2])
    corrections = lora.attach(behind(tower, 1), 3, seed=5)
    assert torch.equal(tower(images[:2]), feature_BD)
    assert any(name.startswith("blocks.1.") for name in corrections)
    assert not any(name.startswith(("blocks.0.", "patch")) for name in corrections)
    again = lora.attach(behind(make_tower(**changes), 1), 3, seed=5)
    assert all(torch.equal(again[name], value) for name, value in corrections.items())
    for name, value in corrections.items():
        value.add_(0.1 if name.endswith("up_OR") else 0.0)
    corrected_BD = tower(images[:2])
    lora.absorb(tower)
    assert tower.state_dict().keys() == names, "the tower is saved and hashed as before"
    assert torch.equal(tower(images[:2]), corrected_BD) and not torch.allclose(corrected_BD, feature_BD)


def arguments(config: TrainConfig) -> list[str]:
    names = [
        "model",
        "data",
        "data_root",
        "split",
        "keep",
        "layer",
        "held_out",
        "num_steps",
        "batch_size",
        "save_every",
        "out",
    ]
    flags = {name: getattr(config, name) for name in names}
    return [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_both_commands(config: TrainConfig, pictures: Path, tmp_path: Path, capsys) -> None:
    cli.run(train_main, TrainConfig, prog="x", args=arguments(config))
    text = capsys.readouterr().out
    assert "frozen: cosine 0." in text and "on 7 held-out images" in text and str(config.out) in text
    words = ["--pruned", str(config.out), "--data", "folder", "--data-root", str(pictures), "--split", "all"]
    words += ["--held-out", "8", "--num-steps", "2", "--batch-size", "4", "--out", str(tmp_path / "c")]
    cli.run(calibrate_main, CalibrateConfig, prog="x", args=words)
    assert "calibrated: cosine 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(scorer="psychic"), "--scorer psychic: unknown; choose one of linear, mlp"),
        (dict(added="psychic"), "--added psychic: unknown"),
        (dict(data="nowhere"), "--data nowhere: unknown"),
        (dict(rest="burn"), "--rest burn: unknown; choose one of fold, drop"),
        (dict(select="best"), "--select best: unknown"),
        (dict(loss="bce"), "reads golden rankings; give --store"),
        (dict(store=Path("x")), "does not read it"),
        (dict(loss="listwise", store=Path("x"), added="static"), "says nothing about tokens or metrics"),
        (dict(num_steps=0), "--num-steps 0: must be 1 or more"),
        (dict(lr=0.0), "--lr 0: must be positive"),
        (dict(noise=float("nan")), "--noise nan: must not be negative"),
        (dict(device="mps"), "--device mps: must be cpu"),
        (dict(where="within"), "--where within: unknown; choose one of before, inside"),
        (dict(where="inside", keep=None, layer=None, macs=0.7), "goes with --cuts or --keep"),
    ],
)
def test_flags_out_of_range_are_refused_before_anything_is_loaded(changes, words, config) -> None:
    with pytest.raises(UserError, match=words):
        check_train(replace(config, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(keep_range=(0.8, 0.3)), "must rise within"),
        (dict(keep_range=(0.01, 0.3)), "0.01 of 16 patches leaves none"),
        (dict(macs=0.7), "exactly one of"),
        (dict(keep=1.0), "nothing would be pruned"),
        (dict(keep=None, layer=None, cuts="1:8,2:4", scorer="mixer"), "serves one cut only"),
        (dict(held_out=99), "leaves none of the 25 images"),
        (dict(batch_size=64), "there are 17 images to train on"),
        (dict(layer=9), "outside this tower of 4 blocks"),
    ],
)
def test_flags_that_do_not_fit_model_or_data_are_refused(changes, words, config, clip) -> None:
    with pytest.raises(UserError, match=words):
        train(replace(config, **changes), clip)
    assert not config.out.exists()


def test_too_little_memory_says_which_flag_helps(config: TrainConfig, clip: LoadedClip, monkeypatch) -> None:
    def full(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(fit, "_step", full)
    with pytest.raises(UserError, match="lower --batch-size"):
        train(config, clip)


def test_a_folder_without_a_training_is_refused(tmp_path: Path, clip: LoadedClip) -> None:
    with pytest.raises(UserError, match="give the --out of a finished training"):
        predictors.read_training(tmp_path)


def test_a_readout_ends_a_calibration_where_it_helps(trained, pictures, clip, tmp_path) -> None:
    """One step of a tiny rate moves nothing, so what is gained is the readout's."""
    draw(tmp_path / "many", 96)
    settings = dict(num_steps=1, save_every=1, lr=1e-9, held_out=40)
    calibrate(calibration(trained, tmp_path / "many", tmp_path / "a", **settings), clip)
    done = calibrate(calibration(trained, tmp_path / "many", tmp_path / "b", readout=True, **settings), clip)
    plain, mapped = results(tmp_path / "a"), results(tmp_path / "b")
    assert mapped["readout_strength"] in STRENGTHS and done.config.output_bias
    assert mapped["held_out"]["distance"] < plain["held_out"]["distance"] and "readout_strength" not in plain
    loaded = predictors.load_pruned(tmp_path / "b")
    with torch.no_grad():
        image = torch.randn(2, 3, 32, 32)
        assert torch.equal(loaded(image), done(image))
