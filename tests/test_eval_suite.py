"""`python -m eval suite` end to end on a tiny saved model: every row, what is skipped and why, going on, speed."""

import json
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

from eval import suite, suite_speed
from eval.records import DENSE, RETRIEVAL, read_records, read_sides
from eval.report_data import SEVEN, read_results
from eval.report_markdown import markdown_page
from eval.report_retrieval import title_of_panel
from eval.report_rows import Measured
from eval.rival_files import parse_files
from eval.rivals import FILES, OURS, build
from eval.suite_accuracy import protocol_for
from eval.suite_config import SuiteConfig, check
from eval.suite_methods import Searched, SharedOracle, build_all
from eval.suite_pictures import extremes, pixels
from eval.suite_sets import ABSENT, Present, find_sets, without_images
from eval.suite_speed import SpeedRow, dense_images_per_s, graph_of, no_cut, paired_times
from patchrank.data.dataset import Dataset, Item
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess

MACS = (0.8, 0.7)


@pytest.fixture(scope="module")
def config(model: Path, tmp_path_factory) -> SuiteConfig:
    folder = tmp_path_factory.mktemp("suite")
    return SuiteConfig(
        model=str(model),
        datasets=("digits",),
        methods=("tome", "dtem", "golden-fold"),
        macs=MACS,
        limit=9,
        oracle_limit=3,
        threads=1,
        rounds=1,
        speed_batch=2,
        pictures=2,
        cache=folder / "features",
        out=folder / "out",
    )


@pytest.fixture(scope="module")
def done(config: SuiteConfig) -> SuiteConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PATCHRANK_ASSETS", raising=False)
        suite.main(config)
    return config


def the_file(folder: Path, kind: str) -> dict:
    (path,) = folder.glob(f"{kind}_*.json")
    return json.loads(path.read_text())


def test_every_row_has_a_record_and_oracles_get_few_images(done: SuiteConfig) -> None:
    found = {(one.method, one.macs): one.num_images for one in read_records(done.out) if one.num_images == 9}
    assert found == {(DENSE, 1.0): 9} | {(name, macs): 9 for name in (OURS, "tome") for macs in MACS}
    few = {(one.method, one.macs) for one in read_records(done.out) if one.num_images == 3}
    assert few == {(DENSE, 1.0)} | {("golden-fold", macs) for macs in MACS}


def test_the_first_images_of_the_oracle_are_the_first_of_all(done: SuiteConfig) -> None:
    ids = {one.num_images: read_sides(done.out, one)["ids"].tolist() for one in read_records(done.out)}
    assert ids[9][:3] == ids[3]


def test_a_whole_run_says_how_long_it_took(done: SuiteConfig) -> None:
    run = the_file(done.out, "suite")["run"]
    assert run["records_before"] == 0 and list(run["seconds"]) == ["accuracy", "speed", "pictures", "oracles", "total"]
    *parts, total = run["seconds"].values()
    assert run["seconds"]["accuracy"] > 0 and sum(parts) <= total + 0.05 * len(parts)  # each is rounded


def test_the_seven_are_never_dropped_and_skipped_methods_say_why(done: SuiteConfig) -> None:
    value = the_file(done.out, "suite")
    states = {one["name"]: one["state"] for one in value["sets"]}
    assert states == {"digits": "measured"} | dict.fromkeys(SEVEN, ABSENT)
    methods = {one["name"]: one for one in value["methods"]}
    assert methods["tome"]["state"] == "measured"
    assert methods["dtem"]["state"] == "skipped" and FILES["dtem"] in methods["dtem"]["reason"]
    assert methods["evit"]["reason"] == "left out by --methods"
    assert {(one["method"], one["macs"]) for one in value["unreached"]} == {("dtem", macs) for macs in MACS}


def test_speed_has_every_row_but_the_oracles(done: SuiteConfig) -> None:
    value = the_file(done.out, "speed")
    assert [(row["method"], row["macs"]) for row in value["rows"]] == [
        (name, macs) for macs in MACS for name in (OURS, "tome")
    ]
    for row in value["rows"]:
        assert row["images_per_s"] == pytest.approx(value["dense_images_per_s"] * row["dense_ms"][0] / row["ms"][0])


def test_pictures_show_the_extremes_of_our_smallest_budget(done: SuiteConfig) -> None:
    (sheet,) = the_file(done.out, "pictures")["sheets"]
    (record,) = [x for x in read_records(done.out) if (x.method, x.macs) == (OURS, min(MACS))]
    cosine = read_sides(done.out, record)["cosine"]
    assert sheet["best"][0]["cosine"] == pytest.approx(cosine.max())
    assert sheet["worst"][0]["cosine"] == pytest.approx(cosine.min())
    assert not {one["id"] for one in sheet["best"]} & {one["id"] for one in sheet["worst"]}
    for one in sheet["best"]:
        assert all(set(later) <= set(former) for former, later in zip(one["kept"], one["kept"][1:]))


def test_a_second_run_measures_only_what_is_new(done: SuiteConfig, monkeypatch) -> None:
    before = {path: path.read_bytes() for path in done.out.glob("digits*")}
    (speed,) = done.out.glob("speed_*.json")
    timed = json.loads(speed.read_text())["rows"]
    rows = []
    monkeypatch.setattr(suite_speed.Timer, "row", lambda self, method: rows.append(method.name) or _row(method))
    suite.main(replace(done, methods=("tome", "drop-random")))
    assert {path: path.read_bytes() for path in before} == before
    new = {path.name for path in done.out.glob("digits*.json")} - {path.name for path in before}
    assert len(new) == len(MACS) and all("drop-random" in name for name in new)
    assert rows == ["drop-random"] * len(MACS)
    assert [row["ms"] for row in json.loads(speed.read_text())["rows"]][: len(timed)] == [row["ms"] for row in timed]


def _row(method) -> SpeedRow:
    return SpeedRow(
        method=method.name, macs=method.macs, image_macs=1, dense_macs=2, runtime="torch", batch=2, threads=1,
        ms=[1.0], dense_ms=[2.0],
    )  # fmt: skip


def test_a_set_of_captions_is_judged_by_retrieval(config: SuiteConfig, tmp_path: Path) -> None:
    names, folder = [f"{number:02d}.jpg" for number in range(12)], tmp_path / "data" / "flickr8k"
    for place in ("Flicker8k_Dataset", "Flickr8k_text"):
        (folder / place).mkdir(parents=True)
    for seed, name in enumerate(names):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(folder / "Flicker8k_Dataset" / name)
    captions = [f"{name}#{number}\t{number} of {name[:2]}" for name in names for number in range(2)]
    (folder / "Flickr8k_text" / "Flickr8k.token.txt").write_text("\n".join(captions))
    for part in ("train", "dev", "test"):
        listed = names if part == "test" else []
        (folder / "Flickr8k_text" / f"Flickr_8k.{part}Images.txt").write_text("\n".join(listed))
    asked = replace(config, datasets=("digits", "flickr8k"), data_root=tmp_path / "data", methods=("tome",), limit=12,
                    runtimes=(), out=tmp_path / "out", cache=None)  # fmt: skip
    suite.main(asked)
    found = [one for one in read_records(asked.out) if one.dataset == "flickr8k"]
    assert {one.task for one in found} == {RETRIEVAL} and {one.num_images for one in found} == {12}
    assert {(one.method, one.macs) for one in found} == {(DENSE, 1.0), *((m, x) for m in (OURS, "tome") for x in MACS)}
    assert [one["dataset"] for one in the_file(asked.out, "pictures")["sheets"]] == ["digits"]
    (results,) = read_results(asked.out)
    assert [panel.dataset for panel in results.panels] == ["digits"]
    assert [title_of_panel(panel) for panel in results.retrieval] == ["Flickr8k, 12 test images"]
    assert all(word in markdown_page([results], [""]) for word in ("Retrieval: Flickr8k", "| Flickr8k | measured |"))


def test_paired_times_take_turns_and_drop_the_first_round(monkeypatch) -> None:
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(suite_speed.time, "perf_counter", lambda: next(clock))
    dense, ours = paired_times(lambda: calls.append("dense"), lambda: calls.append("ours"), 3, lambda: None)
    assert calls == ["dense", "ours"] * 4
    assert dense == ours == [1000.0] * 3


def test_images_per_second_of_the_dense_tower_is_the_median_of_all_its_calls() -> None:
    rows = [{"batch": 2, "dense_ms": [10.0, 20.0]}, {"batch": 2, "dense_ms": [1000.0]}]
    assert dense_images_per_s(rows) == 100.0


def test_only_plain_pruned_towers_are_exported() -> None:
    tower = make_tower(num_layers=6)
    graphs = {name: graph_of(build(name, tower, 0.7)) for name in (OURS, "drop-random", "tome", "drop-farthest")}
    assert [name for name, graph in graphs.items() if graph is not None] == [OURS, "drop-random"]
    image_BCHW = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(no_cut(tower)(image_BCHW), tower(image_BCHW))


def test_budgets_of_an_oracle_share_one_search() -> None:
    tower, image_BCHW = make_tower(num_layers=4), torch.randn(1, 3, 32, 32)
    built = build_all(tower, ["golden-fold"], MACS, {})
    oracles = [method.module for method in built.methods[1:]]
    assert isinstance(oracles[0], SharedOracle) and oracles[0].searched is oracles[1].searched
    with torch.inference_mode():
        for macs, oracle in zip(MACS, oracles):
            torch.testing.assert_close(oracle(image_BCHW), build("golden-fold", tower, macs)(image_BCHW))
    searched, searches = Searched(), []
    for image in (image_BCHW, image_BCHW, image_BCHW + 1):
        searched.scores(image, lambda one: searches.append(1) or one)
    assert len(searches) == 2


@pytest.mark.parametrize(
    "asked, num_head, has_text, num_classes, expected",
    [
        ("auto", 200, False, 200, "coop"),
        ("auto", 200, False, 100, "probe"),
        ("auto", None, True, 100, "coop"),
        ("auto", None, False, 100, "probe"),
        ("openai", None, True, 100, "openai"),
        ("probe", 200, False, 200, "probe"),
    ],
)
def test_protocol_fits_the_model(asked, num_head, has_text, num_classes, expected) -> None:
    assert protocol_for(asked, num_head, has_text, num_classes) == expected


def test_an_absent_set_is_verified_on_its_split_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("PATCHRANK_ASSETS", raising=False)
    assert without_images("dtd", None).num_listed is None
    rows = [[f"banded/banded_{number:04d}.jpg", 0, "banded"] for number in range(3)]
    split = {"train": rows[:1], "val": rows[1:2], "test": rows[2:]}
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "split_zhou_DescribableTextures.json").write_text(json.dumps(split))
    present, (absent,) = find_sets(("dtd",), tmp_path, 10)
    assert not present and absent.num_listed == 1 and "not the 1,692 published" in absent.text


def test_a_half_of_the_classes_is_a_set_of_its_own() -> None:
    (one,), absent = find_sets(("digits/odd",), None, 6)
    assert one.dataset.name == "digits/odd" and len(one.dataset.class_names) == 5 and len(one.items) == 6
    assert absent == []
    with pytest.raises(UserError, match=r"no such half; choose digits/even or digits/odd"):
        find_sets(("digits/third",), None, 6)


def test_a_set_says_how_much_of_it_is_there() -> None:
    items = [Item(str(number), 0) for number in range(20)]
    dataset = Dataset(name="food101", split="test", images=items, read=lambda one: b"")
    assert Present(dataset, items[:5]).text == "5 of 20 test images; the published split has 30,300"


def test_extremes_never_show_an_image_twice() -> None:
    assert extremes(np.array([0.5, 0.9, 0.1]), 4) == ([1], [2])
    assert extremes(np.array([0.5, 0.9, 0.1, 0.7]), 1) == ([1], [2])


def test_pixels_take_the_normalisation_back() -> None:
    preprocess = Preprocess(image_size=(2, 2), resize=2, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    image_HW3 = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    mean, std = (torch.tensor(value)[:, None, None] for value in (preprocess.mean, preprocess.std))
    image_CHW = (torch.from_numpy(image_HW3).permute(2, 0, 1) / 255 - mean) / std
    assert (pixels(preprocess, image_CHW) == image_HW3).all()


def test_files_are_named(tmp_path: Path) -> None:
    assert parse_files([f"dtem={tmp_path}"]) == {"dtem": tmp_path}
    for word, part in (("dtem", "name=path"), (f"tome={tmp_path}", "name=path"), ("dtem=nowhere", "does not exist")):
        with pytest.raises(UserError, match=part):
            parse_files([word])


@pytest.mark.parametrize(
    "changes, part",
    [
        (dict(runtimes=("jax",)), "--runtimes jax: unknown"),
        (dict(macs=(0.7, 0.7)), "different shares"),
        (dict(macs=(1.2,)), "must lie in"),
        (dict(limit=0), "--limit 0"),
        (dict(oracle_limit=0), "--oracle-limit 0"),
        (dict(pictures=-1), "--pictures -1"),
        (dict(methods=("nothing",)), "--methods nothing: unknown"),
    ],
)
def test_mistakes_are_named(changes: dict, part: str) -> None:
    with pytest.raises(UserError, match=part):
        check(SuiteConfig(**changes))


def test_unknown_names_are_refused_before_anything_runs(config: SuiteConfig) -> None:
    with pytest.raises(UserError, match="--datasets mnist: unknown"):
        suite.main(replace(config, datasets=("mnist",)))
    with pytest.raises(UserError, match="--protocol guess: unknown"):
        suite.main(replace(config, protocol="guess"))


def command(folder: Path) -> list[str]:
    """A small suite of the embedded model."""
    words = f"-m eval suite --limit 130 --methods tome --macs 0.7 --rounds 1 --pictures 1 --threads 1 --out {folder}"
    return [sys.executable, *words.split(), "--cache", str(folder / "features")]


@pytest.mark.system
@pytest.mark.timeout(900)
def test_a_killed_suite_goes_on_and_says_the_same(tmp_path: Path) -> None:
    process = subprocess.Popen(command(tmp_path / "killed"))
    while not list((tmp_path / "killed").glob("features/*/*.safetensors")):
        assert process.poll() is None, "the suite ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not read_records(tmp_path / "killed")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("features/*/*.safetensors")}
    for name in ("killed", "whole"):
        subprocess.run(command(tmp_path / name), check=True, timeout=400)
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())
    killed, whole = ({one.key: one for one in measured(tmp_path / name)} for name in ("killed", "whole"))
    assert killed.keys() == whole.keys() == {(DENSE, 1.0), (OURS, 0.7), ("tome", 0.7)}
    for key, one in whole.items():
        assert killed[key].record.metrics == one.record.metrics
        assert (killed[key].sides["cosine"] == one.sides["cosine"]).all()
    words = ["-m", "eval.report", "--results", str(tmp_path / "whole"), "--out", str(tmp_path / "report")]
    subprocess.run([sys.executable, *words], check=True, timeout=400)
    assert "keptpatches" in (tmp_path / "report" / "report.html").read_text()


def measured(folder: Path) -> list[Measured]:
    return [Measured(one, read_sides(folder, one)) for one in read_records(folder)]
