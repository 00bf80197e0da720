"""A run that stops anywhere and goes on gives the same bytes: towers, heads, teacher, optimiser, log."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock
from pretrain_pairs import tiny, write_pairs
from safetensors.torch import load_file, save_file

from patchrank.errors import UserError
from patchrank.pretrain.__main__ import main
from patchrank.pretrain.batches import Batches
from patchrank.pretrain.distributed import World
from patchrank.pretrain.journal import RunLog, read_log
from patchrank.pretrain.loop import open_run, save, state_path, train, train_step
from patchrank.pretrain.pairs import load_pairs
from patchrank.pretrain.shards import ShardStream
from patchrank.pretrain.state import load_state


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def bytes_of(run) -> dict[str, torch.Tensor]:
    save(run)
    return load_file(state_path(run.config.out))


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("recipe, data", [("aclip_fast", "captions"), ("flip50", "digits"), ("maskclip", "captions")])
def test_resumed_equals_uninterrupted_bit_by_bit(pairs, tmp_path, recipe, data):
    # on digits: a curriculum, a cheap start and unmasked tuning in six steps
    changes = dict(recipe=recipe, data=data, num_steps=6, num_warmup=1, batch_size=8)
    changes |= dict(curriculum=0.4, cheap_start=0.3) if data == "digits" else {}
    whole = open_run(tiny(pairs, tmp_path / "whole", **changes))
    for step in range(6):
        train_step(whole, step)
    for first, last in ((0, 3), (3, 6)):
        run = open_run(tiny(pairs, tmp_path / "parts", **changes))
        assert run.progress.step == first
        for step in range(first, last):
            train_step(run, step)
        save(run)
    assert run.progress.pace == whole.progress.pace
    found = bytes_of(whole)
    assert same(found, bytes_of(run))
    assert any("teacher" in name for name in found) == (recipe != "flip50")
    assert any("running_mean" in name for name in found) == (recipe == "aclip_fast")


def test_accumulation_moves_the_teacher_once_a_step(pairs, tmp_path, monkeypatch):
    momenta = []
    run = open_run(tiny(pairs, tmp_path, recipe="att2x50", num_steps=4, num_warmup=1, accumulate=4))
    monkeypatch.setattr(run.learner.teacher, "update", lambda momentum, *_: momenta.append(momentum))
    for step in range(4):
        train_step(run, step)
    assert momenta[0] == pytest.approx(0.996) and momenta[-1] == 1.0 and len(momenta) == 4
    assert momenta == sorted(momenta)


def test_parts_of_a_batch_are_its_pictures_whatever_shares_it(pairs, tmp_path):
    whole = open_run(tiny(pairs, tmp_path, recipe="att2x50")).batches.at(3)
    config = tiny(pairs, tmp_path, recipe="att2x50", accumulate=2)
    source = load_pairs("captions", pairs)
    ranks = [Batches(config, source, config.preprocess(), World(rank, 2)) for rank in (0, 1)]
    parts = [batches.at(3, 1.0, part) for batches in ranks for part in (0, 1)]
    assert [id for part in parts for id in part.ids] == whole.ids
    for name, axis in (("view_VBCHW", 1), ("box_VB4", 1), ("teacher_BCHW", 0), ("teacher_box_B4", 0)):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], axis), getattr(whole, name)), name
    drawn = [part.texts[number] for part in parts for number in part.text_B]
    assert drawn == [whole.texts[number] for number in whole.text_B]


def test_workers_change_nothing(pairs, tmp_path):
    settings = dict(recipe="att2x50", num_steps=4, num_warmup=1, accumulate=2, batch_size=16)
    plain, ahead = (open_run(tiny(pairs, tmp_path, workers=workers, **settings)) for workers in (0, 2))
    for step in (0, 1, 3):  # the third step was not the one drawn ahead
        assert train_step(plain, step) == train_step(ahead, step)
    assert ahead.ahead is not None


def test_gradients_of_accumulated_parts_are_their_mean(pairs, tmp_path):
    run = open_run(tiny(pairs, tmp_path, recipe="clip", accumulate=2, max_norm=0, lr=1e-9))
    train_step(run, 0)
    found = run.pair.text.proj.weight.grad.clone()
    grads = []
    for part in (0, 1):
        run.optimiser.zero_grad()
        batch = run.batches.at(0, 1.0, part)
        run.learner(batch, run.learner.recipe.views, 0.0, torch.Generator())["loss"].backward()
        grads.append(run.pair.text.proj.weight.grad.clone())
    torch.testing.assert_close(found, (grads[0] + grads[1]) / 2, rtol=1e-4, atol=1e-6)


def test_nan_stops_and_names_step_and_batch(pairs, tmp_path, monkeypatch):
    run = open_run(tiny(pairs, tmp_path, recipe="aclip_eff", num_steps=4, num_warmup=1, save_every=2))
    draw = run.batches.at

    def torn(step, difficulty, part):
        batch = draw(step, difficulty, part)
        if step == 3:
            batch.view_VBCHW[0, 0, 0, 0, 0] = float("nan")
        return batch

    monkeypatch.setattr(run.batches, "at", torn)
    with pytest.raises(UserError, match=r"step 3: loss nan.*finite; its batch: \d\d\.png, .* and 29 more; the last st"):
        train(run)
    weights = load_file(state_path(tmp_path))
    assert all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())
    assert open_run(run.config).progress.step == 2
    # the step that failed left weights and teacher as they were
    assert all(tensor.isfinite().all() for tensor in run.learner.teacher.state_dict().values())
    assert all(parameter.isfinite().all() for parameter in run.pair.parameters())


def test_log_is_cut_to_the_state_that_a_run_goes_on_from(tmp_path):
    log = RunLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.add(step, {"loss": step / 10})
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3]
    RunLog(tmp_path, 2).add(3, {"loss": 0.5})
    assert [(row["step"], row["loss"]) for row in read_log(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 0.5)]


def test_state_of_another_version_is_refused(pairs, tmp_path):
    run = open_run(tiny(pairs, tmp_path))
    save(run)
    run.learner.extra = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="another version"):
        load_state(state_path(tmp_path), run.learner, run.optimiser, run.settings)


def test_shards_go_on_where_they_stopped(shards):
    whole = ShardStream(shards, 0, World(), buffer=5)
    captions = [captions for start in range(0, 60, 6) for _, captions in whole.take(start, 6)]
    assert len(set(captions[:32])) == 32 and captions[:32] != captions[32:60]
    assert whole.take(54, 6) is whole.take(54, 6)
    resumed = ShardStream(shards, 0, World(), buffer=5)
    assert [own for _, own in resumed.take(17, 20)] == captions[17:37]
    assert [own for _, own in resumed.take(3, 4)] == captions[3:7]
    halves = [ShardStream(shards, 0, World(rank, 2), buffer=5).take(0, 16) for rank in (0, 1)]
    assert {own for half in halves for _, own in half} == set(captions[:32])
    with pytest.raises(UserError, match="2 shards for 3 processes"):
        ShardStream(shards, 0, World(0, 3))


@pytest.fixture(scope="module")
def shards(pairs, tmp_path_factory):
    library = pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("shards")
    pictures = sorted(pairs.glob("*.png"))
    for number in (0, 1):
        with library.TarWriter(str(folder / f"{number:03d}.tar")) as writer:
            for path in pictures[16 * number : 16 * (number + 1)]:
                writer.write({"__key__": path.stem, "png": path.read_bytes(), "txt": f"picture {path.stem}"})
    return sorted(map(str, folder.glob("*.tar")))


@pytest.mark.system
@pytest.mark.parametrize("recipe", ["aclip_fast", "clip"])
def test_killed_command_goes_on_to_the_same_model(pairs, tmp_path, recipe):
    flags = dict(recipe=recipe, data="captions", data_root=pairs, image_size=32, width=32, num_layers=2, num_heads=2,
                 feature_dim=32, text_width=32, text_layers=1, batch_size=8, num_steps=40, num_warmup=2, save_every=2,
                 head_width=32, head_out=16, threads=1)  # fmt: skip
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    command = [sys.executable, "-m", "patchrank.pretrain", *words, "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([*command, tmp_path / "killed"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not state_path(tmp_path / "killed").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    for folder in ("killed", "whole"):
        subprocess.run([*command, tmp_path / folder], env=environment, check=True, capture_output=True)
    states = [load_file(state_path(tmp_path / folder)) for folder in ("killed", "whole")]
    assert same(*states)
    files = [(tmp_path / folder / "clip.safetensors").read_bytes() for folder in ("killed", "whole")]
    assert files[0] == files[1]


def test_a_run_goes_on_with_its_own_pictures_and_processes_only(pairs, tmp_path):
    save(open_run(tiny(pairs, tmp_path / "run", batch_size=8)))
    fewer = shutil.copytree(pairs, tmp_path / "fewer")
    (fewer / "07.png").unlink()
    with pytest.raises(UserError, match="holds a run with other pictures; give the same"):
        open_run(tiny(fewer, tmp_path / "run", batch_size=8))
    with pytest.raises(UserError, match="holds a run with 1 processes; give the same"):
        open_run(tiny(pairs, tmp_path / "run", batch_size=8), World(size=2))
    moved = shutil.copytree(pairs, tmp_path / "moved")
    assert open_run(tiny(moved, tmp_path / "run", batch_size=8)).progress.step == 0
    save_file({"a": torch.zeros(1)}, state_path(tmp_path / "run"))
    with pytest.raises(UserError, match="is no state of a run"):
        open_run(tiny(pairs, tmp_path / "run", batch_size=8))


def test_a_folder_has_one_run_at_a_time(pairs, tmp_path):
    config = tiny(pairs, tmp_path, num_steps=2, num_warmup=1)
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="another process trains there"):
        main(config)
    (tmp_path / "clip.json").write_text("{}")
    with pytest.raises(UserError, match="without the state of its run"):
        main(config)
    assert (tmp_path / "clip.json").read_text() == "{}"
