"""`python -m patchrank.search` end to end on a tiny saved model: cost, store, table, pictures, errors, resuming."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tower
from PIL import Image

import patchrank.search
from patchrank import atomic, cli
from patchrank.checkpoints.saved import save_clip
from patchrank.data import load_dataset
from patchrank.errors import UserError
from patchrank.loading import load_clip
from patchrank.macs import dense_macs, pruned_macs
from patchrank.preprocess import Preprocess
from patchrank.search.__main__ import main
from patchrank.search.config import SearchConfig
from patchrank.search.cost import cost_line, duration, seconds_per_image, strategy_cost
from patchrank.search.criteria import Target, build_damage
from patchrank.search.explain import make_sheet
from patchrank.search.pictures import draw_overview, draw_sheet, heat_picture, kept_picture, score_map
from patchrank.search.plan import make_plan
from patchrank.search.store import RankingMismatch, open_store
from patchrank.search.strategies import STRATEGIES, Options
from patchrank.search.table import evaluate
from patchrank.search.variants import prepare
from patchrank.text import TextConfig, TextTower

HALF = (0.5, 0.5, 0.5)


def save_tiny(folder: Path, side: int) -> Path:
    torch.manual_seed(0)
    text = TextTower(TextConfig(width=16, num_layers=1, num_heads=2, mlp_width=16, output_dim=24))
    preprocess = Preprocess(image_size=(side, side), resize=side, mean=HALF, std=HALF)
    tower = make_tower(image_size=(side, side))
    save_clip(folder, tower, text, preprocess, 20.0, name="tiny", dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A CLIP of 16 patches with random weights."""
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", 32)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes of two pictures, and one file that is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(("cat/a.png", "cat/b.png", "dog house/c.png", "dog house/d.jpg")):
        (folder / name).parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "cat" / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def config(model: Path, pictures: Path, tmp_path: Path) -> SearchConfig:
    return SearchConfig(
        model=str(model),
        data="folder",
        data_root=pictures,
        strategy="sweep",
        threads=1,
        shard_size=2,
        out=tmp_path / "store",
    )


def arguments(config: SearchConfig, *more: str) -> list[str]:
    flags = dict(
        model=config.model, data=config.data, data_root=config.data_root, strategy=config.strategy, out=config.out
    )
    flags |= dict(threads=config.threads, shard_size=config.shard_size, split=config.split)
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*words, *more]


def command(args: list[str]) -> None:
    cli.run(main, SearchConfig, prog="python -m patchrank.search", args=args)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rankings(folder: Path) -> dict[str, bytes]:
    return {
        name: data for name, data in content(folder).items() if name.startswith(("shards", "manifest", "search.json"))
    }


def test_one_run_leaves_store_table_pictures_and_config(config: SearchConfig, capsys) -> None:
    command(arguments(config, "--explain", "3", "--keep", "0.75", "0.5"))
    out = capsys.readouterr().out
    store = open_store(config.out)
    assert sorted(store.ids) == ["cat/a.png", "cat/b.png", "dog house/c.png", "dog house/d.jpg"]
    assert store.broken == ["cat/broken.png"] and "1 broken image was skipped: cat/broken.png" in out
    assert out.index("cost: sweep under fold") < out.index("golden (sweep)")
    results = json.loads((config.out / "results.json").read_text())
    names = ["golden", "random", "checkerboard", "class-attention"]
    assert [(row["ranking"], row["keep"]) for row in results["rows"]] == [(n, k) for n in names for k in (0.75, 0.5)]
    assert all(0 <= row["acc1"] <= 1 and -1 <= row["cosine"] <= 1.0001 for row in results["rows"])
    assert results["num_images"] == 4 and 0 <= results["dense_acc1"] <= 1
    assert results["search"]["weights_hash"] == store.request["weights_hash"]
    with open(config.out / "results.csv", newline="") as file:
        assert [row["ranking"] for row in csv.DictReader(file)] == [row["ranking"] for row in results["rows"]]
    saved = json.loads((config.out / "config.json").read_text())
    assert saved["layer"] == 1 and saved["keep"] == [0.75, 0.5] and saved["split"] == "all" and saved["threads"] == 1
    made = sorted(path.name for path in (config.out / "pictures").iterdir())
    assert len(made) == 4 and made[-1] == "overview.png"
    for path in (config.out / "pictures").iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 100


def test_a_complete_store_is_not_computed_again(config: SearchConfig, capsys, monkeypatch) -> None:
    main(config)
    before = rankings(config.out)
    (config.out / "results.json").unlink()
    monkeypatch.setattr("patchrank.search.runner.search_image", lambda *args: pytest.fail("searched again"))
    capsys.readouterr()
    main(config)
    assert "this search is complete, nothing to compute\n" in capsys.readouterr().out
    assert rankings(config.out) == before and (config.out / "results.json").exists()


def test_a_dry_run_says_the_cost_and_writes_nothing(config: SearchConfig, capsys) -> None:
    main(replace(config, dry_run=True))
    line = capsys.readouterr().out
    assert line.startswith("cost: sweep under fold takes ") and line.count("\n") == 1
    for word in ("TMAC an image (1 MAC = 2 FLOP)", "5 images", "on this machine (1 thread"):
        assert word in line
    assert not config.out.exists()


def test_two_ranks_give_the_bytes_of_one_and_the_last_reports(config: SearchConfig, capfd, monkeypatch) -> None:
    main(config)
    capfd.readouterr()
    two = replace(config, out=config.out.with_name("two"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    main(two)
    printed = capfd.readouterr()
    assert "cost:" in printed.out and "golden" not in printed.out and not (two.out / "manifest.json").exists()
    monkeypatch.setenv("RANK", "1")
    main(two)
    printed = capfd.readouterr()
    assert "golden (sweep)" in printed.out and "cost:" not in printed.out and "search (" not in printed.err
    assert rankings(two.out) == rankings(config.out)
    main(two)  # complete: rank 1 has nothing to say
    assert capfd.readouterr().out == ""


def test_kill_minus_nine_and_resume_gives_the_bytes_of_an_undisturbed_run(tmp_path: Path, capsys) -> None:
    model = save_tiny(tmp_path / "model", 48)
    flags = ["--model", str(model), "--strategy", "greedy", "--limit", "12", "--shard-size", "1", "--threads", "1"]
    killed = [*flags, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(
        [sys.executable, "-m", "patchrank.search", *killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    third = tmp_path / "killed" / "shards" / "00002.safetensors"
    try:
        while not third.exists() and process.poll() is None:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "manifest.json").exists()
    before = {name: data for name, data in rankings(tmp_path / "killed").items() if not name.endswith(".tmp")}
    assert 3 <= len([name for name in before if name.startswith("shards")]) < 12
    command(killed)
    assert " left to do: " in capsys.readouterr().out
    command([*flags, "--out", str(tmp_path / "whole")])
    after = rankings(tmp_path / "killed")
    assert all(after[name] == data for name, data in before.items())
    assert after == rankings(tmp_path / "whole")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--criterion", "loss"], "preservation, confidence, label"),
        (["--strategy", "magic"], "greedy"),
        (["--data", "imagnet"], "digits"),
        (["--rest", "keep"], "fold, drop"),
        (["--merge-norm", "sum"], "preserve, mean"),
        (["--split", "dev"], "all"),
        (["--limit", "0"], "--limit 0: must be 1 or more"),
        (["--limit", "-4"], "--limit -4: must be 1 or more"),
        (["--keep", "0.5", "1.5"], "--keep 1.5: must lie in (0, 1]"),
        (["--keep", "0"], "--keep 0: must lie in (0, 1]"),
        (["--layer", "4"], "--layer 4: outside this tower of 4 blocks; use 0 to 3"),
        (["--layer", "-1"], "--layer -1: outside this tower of 4 blocks; use 0 to 3"),
        (["--window", "9"], "--window 9"),
        (["--window", "0"], "--window 0"),
        (["--chunk", "0"], "--chunk 0"),
        (["--shard-size", "0"], "--shard-size 0"),
        (["--threads", "0"], "--threads 0"),
        (["--explain", "-1"], "--explain -1"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--data-root", "/no/such/folder"], "/no/such/folder"),
        (["--model", "ViT-B-99"], "ViT-B-99"),
    ],
)
def test_bad_values_are_one_line_with_the_remedy(config: SearchConfig, capsys, flags: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as left:
        command(arguments(config, *flags))
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and words in printed.err
    assert not config.out.exists()


def test_an_empty_folder_is_named(config: SearchConfig, capsys, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as left:
        command(arguments(config, "--data-root", str(tmp_path / "empty")))
    assert left.value.code == 2
    assert "empty: no pictures in this folder" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_is_one_line(config: SearchConfig, capsys, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as left:
        command(arguments(config, "--out", str(tmp_path / place)))
    printed = capsys.readouterr().err
    assert left.value.code == 2
    assert printed.count("\n") == 1 and str(tmp_path / "file") in printed and "--out" in printed


@pytest.mark.parametrize("number, words", [(errno.EACCES, "no permission"), (errno.ENOSPC, "the disk is full")])
def test_system_errors_while_writing_name_the_folder_and_keep_the_work(
    config: SearchConfig, capsys, monkeypatch, number: int, words: str
) -> None:
    real = atomic.os.fsync
    calls = []

    def fsync(file: int) -> None:
        calls.append(file)
        if len(calls) > 3:  # config.json, search.json and one shard
            raise OSError(number, "the system's word")
        real(file)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    with pytest.raises(SystemExit) as left:
        command(arguments(config))
    printed = capsys.readouterr().err
    assert left.value.code == 2
    assert f"error: {config.out}: " in printed and words in printed
    monkeypatch.undo()
    assert len(list((config.out / "shards").iterdir())) == 1
    main(config)
    assert len(open_store(config.out).ids) == 4


def test_a_store_of_another_search_and_a_damaged_shard_are_one_line(config: SearchConfig, capsys) -> None:
    main(config)
    for flags, words in ((["--layer", "2"], "layer 1 (now 2)"), (["--strategy", "greedy"], "strategy")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            command(arguments(config, *flags))
        printed = capsys.readouterr().err
        assert left.value.code == 2 and words in printed and printed.count("\n") == 1
    shard = config.out / "shards" / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SystemExit) as left:
        command(arguments(config))
    assert left.value.code == 2 and "00000.safetensors" in capsys.readouterr().err
    shard.unlink()
    main(config)
    assert len(open_store(config.out).ids) == 4


def test_the_function_gives_the_bytes_of_the_command(config: SearchConfig, model: Path, pictures: Path) -> None:
    main(config)
    settings = dict(model=str(model), data="folder", data_root=pictures, strategy="sweep", threads=1, shard_size=2)
    store = patchrank.search.search(**settings, out=config.out.with_name("call"))
    assert rankings(config.out.with_name("call")) == rankings(config.out)
    assert store.ids == open_store(config.out).ids
    again = patchrank.search(**settings, out=config.out.with_name("call"))
    assert torch.equal(again.order_BN, store.order_BN)


def test_the_function_takes_what_is_already_loaded(model: Path, pictures: Path, tmp_path: Path, capfd) -> None:
    clip, dataset = load_clip(str(model)), load_dataset("folder", root=pictures, split="all")
    before = torch.get_num_threads()
    store = patchrank.search.search(clip, dataset, out=str(tmp_path), limit=3, strategy="sweep", threads=1)
    assert len(store.ids) + len(store.broken) == 3
    assert store.request["model"] == "tiny" and store.request["data"] == "folder" and store.request["split"] == "all"
    assert torch.get_num_threads() == before
    assert capfd.readouterr() == ("", "")
    with pytest.raises(UserError, match="limits: no setting of search"):
        patchrank.search.search(clip, dataset, limits=3)
    with pytest.raises(RankingMismatch, match="other settings"):
        patchrank.search.search(clip, dataset, out=tmp_path, limit=2, strategy="sweep", threads=1)


@pytest.mark.parametrize("rest", ["fold", "drop"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_dry_cost_is_what_the_strategy_spends(config: SearchConfig, strategy: str, rest: str) -> None:
    options = Options(steps=6, randoms=6, mutations=1, rounds=3, masks=20)
    plan = make_plan(replace(config, strategy=strategy, rest=rest, options=options))
    cost = strategy_cost(plan.job)
    with torch.no_grad():
        variants = prepare(plan.clip.tower, torch.randn(3, 32, 32), plan.job.spec, plan.job.chunk)
        damage = build_damage("preservation", Target(variants.dense_D))
        STRATEGIES[strategy].run(variants, damage, options, torch.Generator().manual_seed(0))
    adapts = strategy == "joint" and rest == "fold"  # how many may leave in a round depends on their hosts
    assert cost.macs == (pytest.approx(variants.macs, rel=0.25) if adapts else variants.macs)
    assert 0 < seconds_per_image(plan.job, cost) < 60


def test_the_dry_cost_leaves_the_global_generator_alone(config: SearchConfig) -> None:
    job = make_plan(config).job
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    cost_line(job, 4, 2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.04, "0.0 s"),
        (7.4, "7 s"),
        (89, "89 s"),
        (120, "2.0 min"),
        (3000, "50 min"),
        (7200, "2.0 h"),
        (9e5, "10.4 days"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_table_measures_what_the_pruned_tower_does(config: SearchConfig) -> None:
    """The golden row, by hand: prune with PrunedTower at every keep ratio, compare, count."""
    from patchrank.pruned import PrunedTower

    main(config)
    plan, store = make_plan(config), open_store(config.out)
    results = evaluate(plan, store, (0.8, 0.4), lambda: None)
    by_id = {item.id: item for item in plan.items}
    for row in results.rows[:2]:
        cosines, hits = [], []
        for image_id, score_N in zip(store.ids, store.score_BN):
            image = plan.job.image(by_id[image_id])[None]
            pruned = PrunedTower(plan.clip.tower, plan.job.spec.with_keep(row.keep), None)
            feature = pruned(image, score_N[None])
            cosines.append(torch.cosine_similarity(feature, plan.clip.tower(image)).item())
            hits.append(plan.job.logits(feature).argmax().item() == by_id[image_id].label)
        assert row.ranking == "golden"
        assert row.cosine == pytest.approx(np.mean(cosines), abs=1e-5)
        assert row.acc1 == pytest.approx(np.mean(hits))
        share = pruned_macs(plan.clip.tower.config, plan.job.spec.with_keep(row.keep)) / dense_macs(
            plan.clip.tower.config
        )
        assert row.macs_share == pytest.approx(share) and share < 1


def test_pictures_without_classes_and_with_one_image(config: SearchConfig, pictures: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "ä picture with a long name.png").write_bytes((pictures / "cat" / "a.png").read_bytes())
    main(replace(config, data_root=flat, explain=5))
    results = json.loads((config.out / "results.json").read_text())
    assert results["dense_acc1"] is None and all(row["acc1"] is None for row in results["rows"])
    assert len(list((config.out / "pictures").iterdir())) == 2


def test_what_is_kept_is_shown_and_the_rest_is_faded(config: SearchConfig) -> None:
    main(config)
    plan, store = make_plan(config), open_store(config.out)
    item = next(item for item in plan.items if item.id == store.ids[0])
    sheet = make_sheet(plan, item, store.order_BN[0], (0.5,))
    assert score_map(sheet.order_N, sheet.grid).flatten()[store.order_BN[0].long()].tolist() == pytest.approx(
        [1 - rank / 15 for rank in range(16)]
    )
    shown = kept_picture(sheet, 8)
    for patch in range(16):
        rows, columns = slice(patch // 4 * 8, patch // 4 * 8 + 8), slice(patch % 4 * 8, patch % 4 * 8 + 8)
        is_kept = patch in store.order_BN[0, :8].tolist()
        assert np.array_equal(shown[rows, columns], sheet.picture_HWC[rows, columns]) == is_kept
    assert heat_picture(sheet).shape == sheet.picture_HWC.shape == (32, 32, 3)
    assert sheet.kept[0].cosine == pytest.approx(sheet.golden_M[list(sheet.curve_keep_M).index(0.5)])
    assert sheet.golden_M[0] == pytest.approx(1.0, abs=1e-5) and sheet.random_RM[:, 0] == pytest.approx(1.0, abs=1e-5)
    assert draw_sheet(sheet) == draw_sheet(sheet)
    assert draw_overview([sheet] * 9, "nine")[:8] == b"\x89PNG\r\n\x1a\n"


def test_help_lists_every_flag(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        command(["--help"])
    printed = capsys.readouterr().out
    assert left.value.code == 0
    for flag in (
        "--model",
        "--pretrained",
        "--data",
        "--data-root",
        "--layer",
        "--rest",
        "--seed",
        "--device",
        "--out",
    ):
        assert flag in printed


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no users here")
def test_a_folder_without_write_permission_is_one_line(config: SearchConfig, capsys, tmp_path: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("root may write everywhere; the error itself is covered by test_system_errors_while_writing")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(SystemExit) as left:
        command(arguments(config, "--out", str(locked / "store")))
    assert left.value.code == 2 and "no permission" in capsys.readouterr().err
