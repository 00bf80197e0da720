"""The pretraining loop: it learns, resumes to the same bytes, stops at NaN, and writes what `load_clip` reads."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from patchrank.errors import UserError
from patchrank.loading import load_clip
from patchrank.pretrain.__main__ import main
from patchrank.pretrain.config import PretrainConfig, check
from patchrank.pretrain.loop import forward, open_run, state_path, train, train_step, update
from patchrank.pretrain.model import build_pair
from patchrank.pretrain.recipes import EVERYTHING, RECIPES, view_at
from patchrank.pretrain.state import save_state

TINY = dict(
    image_size=32,
    patch_size=8,
    width=32,
    num_layers=2,
    num_heads=2,
    feature_dim=16,
    text_width=32,
    text_layers=1,
    batch_size=8,
    num_steps=6,
    num_warmup=1,
    save_every=2,
    eval_every=100,
    threads=1,
)


@pytest.fixture(autouse=True)
def one_thread():
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture
def config(tmp_path):
    return lambda **changes: PretrainConfig(**(TINY | {"out": tmp_path / "run"} | changes))


@pytest.fixture
def few_val(monkeypatch):
    """Checks on 20 pictures instead of thousands."""
    import patchrank.pretrain.__main__ as command
    import patchrank.pretrain.loop as loop

    for module in (command, loop):
        load = module.load_dataset

        def short(name, root=None, split="test", load=load):
            dataset = load(name, root=root, split=split)
            if split != "train":
                del dataset.images[20:]
            return dataset

        monkeypatch.setattr(module, "load_dataset", short)


def weights(run):
    return {name: tensor.clone() for name, tensor in run.pair.state_dict().items()}


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_learns_a_batch(config, recipe):
    run = open_run(config(recipe=recipe, lr=3e-3))
    batch = run.batches.at(0, 1.0)
    chance = torch.Generator().manual_seed(0)
    first, hits = forward(run.pair, batch, EVERYTHING, chance)
    assert hits < 0.9
    for step in range(120):
        view = view_at(step, 120, RECIPES[recipe], 0.0, 1.0)
        update(run.pair, run.optimiser, forward(run.pair, batch, view, chance)[0], step)
    last, hits = forward(run.pair, batch, EVERYTHING, chance)
    assert last < 0.5 * first and hits == 1.0


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resumed_equals_uninterrupted_bit_by_bit(config, stop, tmp_path):
    settings = dict(recipe="flip50", curriculum=0.4, cheap_start=0.3)
    whole = open_run(config(**settings, out=tmp_path / "whole"))
    for step in range(6):
        train_step(whole, step)
    first = open_run(config(**settings))
    for step in range(stop):
        train_step(first, step)
    save_state(state_path(first.config.out), first.pair, first.optimiser, first.progress, first.config.settings())
    second = open_run(config(**settings))
    assert second.progress.step == stop
    for step in range(stop, 6):
        train_step(second, step)
    assert second.progress.pace == whole.progress.pace
    expected, found = weights(whole), weights(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.system
def test_killed_command_goes_on_to_the_same_model(tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (TINY | {"num_steps": 40}).items()]
    command = [sys.executable, "-m", "patchrank.pretrain", *flags, "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([*command, tmp_path / "killed"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not state_path(tmp_path / "killed").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    for folder in ("killed", "whole"):
        subprocess.run([*command, tmp_path / folder], env=environment, check=True, capture_output=True)
    files = [(tmp_path / folder / "clip.safetensors").read_bytes() for folder in ("killed", "whole")]
    assert files[0] == files[1]


def test_nan_stops_with_one_line_and_leaves_the_weights(config):
    run = open_run(config())
    before = weights(run)
    batch = run.batches.at(0, 1.0)
    batch.image_BCHW[0, 0, 0, 0] = float("nan")
    loss, _ = forward(run.pair, batch, EVERYTHING, torch.Generator())
    with pytest.raises(UserError, match=r"step 7: loss nan.*finite; give a lower --lr"):
        update(run.pair, run.optimiser, loss, 7)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.pair.state_dict().items())


def test_scale_stays_at_most_100(config):
    run = open_run(config())
    with torch.no_grad():
        run.pair.log_scale.fill_(10.0)
    run.pair.clamp_scale()
    assert run.pair.log_scale.exp().item() == pytest.approx(100.0)


def test_command_writes_a_model_that_load_clip_reads(config, few_val, capsys):
    chosen = config(num_steps=2)
    main(chosen)
    clip = load_clip(str(chosen.out))
    state = open_run(chosen).pair.state_dict()
    for name, tensor in clip.tower.state_dict().items():
        assert torch.equal(tensor, state[f"tower.{name}"].half().float())
    manifest = json.loads((chosen.out / "clip.json").read_text())
    assert clip.model_name == "clip-digits"
    assert manifest["recipe"]["settings"] == chosen.settings()
    assert set(manifest["recipe"]["accuracy"]) == {"val", "test"}
    assert "Zero-shot accuracy" in manifest["recipe"]["card"] and "Limits" in manifest["recipe"]["card"]
    assert "2 of 2 steps of 8 to go" in capsys.readouterr().out


def test_finished_run_computes_nothing_more(config, few_val):
    chosen = config(num_steps=2)
    main(chosen)
    weights_before = (chosen.out / "clip.safetensors").read_bytes()
    run = open_run(chosen)
    train(run)
    assert run.progress.step == 2
    main(chosen)
    assert (chosen.out / "clip.safetensors").read_bytes() == weights_before


def test_dry_run_writes_nothing(config, capsys):
    chosen = config(dry_run=True)
    main(chosen)
    assert "million MACs" in capsys.readouterr().out
    assert not chosen.out.exists()


def test_state_of_other_settings_is_refused(config):
    run = open_run(config())
    train_step(run, 0)
    save_state(state_path(run.config.out), run.pair, run.optimiser, run.progress, run.config.settings())
    with pytest.raises(UserError, match=r"holds a run with --lr 0\.001"):
        open_run(config(lr=0.5))
    state_path(run.config.out).write_bytes(b"half a file")
    with pytest.raises(UserError, match="cannot be read"):
        open_run(config())


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(recipe="glip"), "clip, flip50"),
        (dict(data="digit"), "digits"),
        (dict(image_size=30), "multiple of --patch-size 8"),
        (dict(width=30), "multiple of 4 x --num-heads"),
        (dict(num_steps=0), "1 or more"),
        (dict(num_warmup=6), "less than --num-steps"),
        (dict(cheap_keep=0.0), r"\(0, 1\]"),
        (dict(curriculum=1.0), r"\[0, 1\)"),
        (dict(device="tpu"), "cpu or cuda"),
    ],
)
def test_bad_values_name_the_rule(config, changes, word):
    with pytest.raises(UserError, match=word):
        check(config(**changes))


def test_batch_larger_than_the_data_is_refused(config):
    with pytest.raises(UserError, match="20000 train pictures"):
        open_run(config(batch_size=20_001))


def test_same_seed_same_towers_and_global_chance_untouched(config):
    chosen = config()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, third = (build_pair(chosen.tower_config(), chosen.text_config(), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert not torch.equal(first.tower.patch.weight, third.tower.patch.weight)
