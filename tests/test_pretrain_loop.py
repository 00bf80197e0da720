"""The loop: precision, checks, log, export to open_clip, several processes under torchrun."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from pretrain_pairs import tiny, write_pairs
from safetensors.torch import load_file

from patchrank.data import Dataset, Item
from patchrank.pretrain.evaluate import check_pair, num_tested, open_checks
from patchrank.pretrain.journal import read_log
from patchrank.pretrain.loop import open_run, save, state_path, train, train_step
from patchrank.pretrain.meter import Meter
from patchrank.pretrain.open_clip_export import save_open_clip
from patchrank.pretrain.pictures import Pictures
from patchrank.text import tokenize
from patchrank.torchvision_shim import ensure_torchvision


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def test_bfloat16_follows_float32_with_float32_weights(pairs, tmp_path):
    runs = [open_run(tiny(pairs, tmp_path, recipe="aclip_eff", precision=name)) for name in ("float32", "bfloat16")]
    exact, rounded = ([train_step(run, step)["loss"] for step in range(3)] for run in runs)
    assert rounded == pytest.approx(exact, rel=0.05) and rounded != exact
    assert {parameter.dtype for parameter in runs[1].learner.parameters()} == {torch.float32}


def test_train_logs_rates_and_checks_and_stops_when_told(pairs, tmp_path):
    config = tiny(pairs, tmp_path, recipe="att1x50", num_steps=8, num_warmup=1, batch_size=8, log_every=2, eval_every=2,
                  eval_split="train")  # fmt: skip
    run = open_run(config)
    train(run, until=lambda progress: progress.step == 4)
    rows = read_log(tmp_path)
    rates = [row for row in rows if "images_per_s" in row]
    assert [row["step"] for row in rates] == [2, 4]
    assert all(row["tokens_per_s"] == pytest.approx(9 * row["images_per_s"]) for row in rates)
    assert all(0 < row["teacher_share"] < 1 and row["loss"] > 0 for row in rates)
    checks = [row for row in rows if "captions t2i@1" in row]
    assert [row["step"] for row in checks] == [2, 4] and checks[0]["captions i2t@10"] <= 1
    assert open_run(config).progress.step == 4


def test_retrieval_of_a_check_is_that_of_its_features(pairs, tmp_path):
    run = open_run(tiny(pairs, tmp_path))
    checks = open_checks(run.config, "train", run.preprocess)
    found = check_pair(run.pair, checks, run.preprocess, 5)
    images = torch.stack([run.preprocess(checks[0].dataset.open(f"{number:02d}.png")) for number in range(32)])
    texts = [item.captions[0] for item in checks[0].dataset.images]
    with torch.no_grad():
        image_BD = torch.nn.functional.normalize(run.pair.tower(images), dim=-1)
        text_BD = torch.nn.functional.normalize(run.pair.text(tokenize(texts, 16)), dim=-1)
    rank_B = (text_BD @ image_BD.T > (text_BD * image_BD).sum(1, keepdim=True)).sum(1)
    assert found["captions t2i@5"] == pytest.approx((rank_B < 5).float().mean().item())
    assert run.pair.training


@pytest.mark.parametrize("sizes", [(4, 1, 2), (2, 2, 2)])
def test_classes_of_unequal_size_also_have_a_mean_of_their_own(pairs, tmp_path, sizes):
    """Against a loop over classes; features are given, so that only the counting is at stake."""
    run = open_run(tiny(pairs, tmp_path))
    labels = [label for label, num in enumerate(sizes) for _ in range(num)]
    items = [Item(str(number), label) for number, label in enumerate([*labels, None])]
    toy = Dataset(name="toy", split="val", images=items, class_names=["bird", "cup", "tree"], read=lambda id: b"")
    feature_nD = torch.randn(len(items), run.config.feature_dim, generator=torch.Generator().manual_seed(3))
    look = lambda pictures: (feature_nD, list(range(len(items))))  # noqa: E731
    pictures = Pictures(toy, run.preprocess)
    found = check_pair(run.pair, [pictures], run.preprocess, 4, look)
    with torch.no_grad():
        text_YD = run.pair.text(tokenize([f"a photo of a {name}." for name in toy.class_names], 16))
        nearest = (feature_nD @ torch.nn.functional.normalize(text_YD, dim=-1).T).argmax(1).tolist()
    hits = [nearest[place] == label for place, label in enumerate(labels)]
    shares = [[hit for hit, label in zip(hits, labels) if label == own] for own in range(3)]
    expected, num = {"toy accuracy": sum(hits) / len(hits)}, {"toy": len(items)}
    if len(set(sizes)) > 1:
        expected["toy mean_per_class_recall"] = sum(sum(own) / len(own) for own in shares) / 3
        num["toy mean_per_class_recall"] = 9 / (1 / 4 + 1 + 1 / 2)
    assert found == pytest.approx(expected) and 0 < found["toy accuracy"] < 1
    assert num_tested(pictures) == pytest.approx(num)


def test_open_clip_reads_the_pair(pairs, tmp_path):
    ensure_torchvision()
    import open_clip

    run = open_run(tiny(pairs, tmp_path))
    with torch.no_grad():
        for parameter in run.pair.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_open_clip(tmp_path / "open_clip", run.pair, run.preprocess)
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'open_clip'}")
    model.text.use_pad_mask = True
    images, texts = torch.randn(2, 3, 32, 32), ["one red", "a longer text that is cut"]
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), run.pair.tower(images), rtol=1e-4, atol=1e-4)
        tokens = tokenize(texts, model.context_length)
        torch.testing.assert_close(model.encode_text(tokens), run.pair.text(tokens), rtol=1e-4, atol=1e-4)
    picture = run.batches.dataset.open("00.png")
    torch.testing.assert_close(transform(picture), run.preprocess(picture))


@pytest.mark.system
def test_tensorboard_files_are_written(pairs, tmp_path):
    pytest.importorskip("tensorboard")
    run = open_run(tiny(pairs, tmp_path, num_steps=2, num_warmup=1, tensorboard=True, log_every=1))
    train(run)
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.system
def test_torchrun_gives_the_losses_of_one_process(pairs, tmp_path):
    """Two gloo processes against one, with a teacher; without heads, as a batch norm sees its own part only."""
    flags = dict(recipe="att2x50", data="captions", data_root=pairs, image_size=32, width=32, num_layers=2, num_heads=2,
                 feature_dim=32, text_width=32, text_layers=1, batch_size=32, num_steps=4, num_warmup=1, log_every=1,
                 lr=1e-3, threads=1)  # fmt: skip
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, "-m", "patchrank.pretrain", *words, "--out", str(tmp_path / name)]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert [row["loss"] for row in two if "loss" in row] == pytest.approx([row["loss"] for row in one if "loss" in row],
                                                                         rel=1e-4)  # fmt: skip
    states = [load_file(state_path(tmp_path / name)) for name in ("one", "two")]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-2, atol=2e-4)
    assert json.loads((tmp_path / "two" / "clip.json").read_text())["kind"] == "patchrank clip"


def test_locked_tower_is_not_repeated_in_the_state(pairs, tmp_path):
    run = open_run(tiny(pairs, tmp_path, recipe="lit", context=24))
    train_step(run, 0)
    save(run)
    assert not any("tower" in name for name in load_file(state_path(tmp_path)))
    again = open_run(run.config)
    assert again.progress.step == 1
    assert torch.equal(again.pair.text.proj.weight, run.pair.text.proj.weight)


def test_tokens_are_those_of_the_steps_and_checks_are_no_training_time(pairs, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("patchrank.pretrain.meter.time", SimpleNamespace(monotonic=lambda: clock[0]))
    config = tiny(pairs, tmp_path, recipe="flip50", num_steps=10, num_warmup=1, batch_size=8, tuning=0.5)
    meter = Meter(config, open_run(config).learner)
    rates = []
    for step in range(10):
        clock[0] += 2.0
        meter.count(step)
        if step % 5 == 4:
            clock[0] += 100.0
            meter.skip(100.0)
            rates.append(meter.read())
    assert [rate["images_per_s"] for rate in rates] == [4.0, 4.0]
    assert [rate["tokens_per_s"] for rate in rates] == [4.0 * 9, 4.0 * 17], "masked, then unmasked tuning"
