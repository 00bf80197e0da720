"""The same-budget study and the cost benchmark: queue, plan, verdicts, and the whole commands on 32 pictures."""

import inspect
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout
from pretrain_pairs import write_pairs

from eval import pretrain_cost, pretrain_study
from eval.pretrain_cost import PretrainCostConfig
from eval.pretrain_steps import build, peak_resident, small_config, step_seconds, towers_of
from eval.pretrain_study import PretrainStudyConfig, make_plan, minutes_of, num_steps, pretrain_config, queue
from eval.pretrain_study_jobs import ABLATIONS, FIRST, Job
from eval.pretrain_study_page import as_page
from eval.pretrain_study_report import as_lines, macs_of_run, spread, study_rows, verdicts
from patchrank.errors import UserError
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.maskers import MASKERS
from patchrank.pretrain.recipes import RECIPES
from patchrank.pretrain.rules import check

SECOND_A_STEP = {"seconds_per_step": 1.0}


def row(recipe: str, seed: int, value: float, tier: int = 1, num: int = 1000) -> dict:
    return {"recipe": recipe, "tier": tier, "seed": seed, "steps": 10, "seconds": 60.0, "macs": 1e15,
            "metrics": {"toy accuracy": value}, "num_test": {"toy": num}, "checks": []}  # fmt: skip


def test_queue_gives_every_recipe_a_run_before_any_has_two():
    config = PretrainStudyConfig()
    jobs = queue(config)
    assert [job.recipe for job in jobs[:12]] == [*FIRST, *FIRST] and [job.seed for job in jobs[5:7]] == [0, 1]
    assert {job.recipe for job in jobs} == set(RECIPES) - {"lit"} and len(set(jobs)) == len(jobs)
    assert minutes_of(config, jobs) == 12 * 30 + 13 * 10
    assert [job.recipe for job in queue(replace(config, tiers=(2,), recipes=("slip",)))] == ["slip"]


def test_ablations_are_their_recipe_with_another_masker():
    jobs = {job.recipe: job for job in queue(PretrainStudyConfig(tiers=(3,)))}
    assert set(jobs) == {"pgs-0.5", "att2x50", *ABLATIONS}
    for name, (recipe, masker) in ABLATIONS.items():
        run = pretrain_config(PretrainStudyConfig(), jobs[name], 10)
        assert (run.recipe, run.masker) == (recipe, masker) and masker in MASKERS
        check(run)
        command = pretrain_study._command(PretrainStudyConfig(), jobs[name], {"recipes": {name: SECOND_A_STEP}})
        assert command[command.index("--masker") + 1] == masker
    plain = pretrain_study._command(PretrainStudyConfig(), jobs["pgs-0.5"], {"recipes": {"pgs-0.5": SECOND_A_STEP}})
    assert "--masker" not in plain


def test_plan_is_measured_once_and_belongs_to_its_data(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        pretrain_study, "_step_seconds", lambda _, names: asked.append(names) or dict.fromkeys(names, 0.5)
    )
    config = PretrainStudyConfig(out=tmp_path, minutes=(1.0, 0.5, 0.5))
    jobs = [Job("clip", 1, 0), Job("aclip", 1, 0), Job("clip", 2, 0)]
    plan = make_plan(config, jobs[:1])
    assert make_plan(config, jobs[:1]) == plan
    plan = make_plan(config, jobs)
    assert asked == [["clip"], ["aclip"]] and plan["recipes"]["clip"] == {"seconds_per_step": 0.5}
    assert [num_steps(config, job, plan) for job in jobs] == [120, 120, 60]
    plan["recipes"]["flip50"] = {"seconds_per_step": 0.5}
    # a tenth of its steps masks nothing
    assert 105 < num_steps(config, Job("flip50", 1, 0), plan) < 112
    with pytest.raises(UserError, match="another --out"):
        make_plan(replace(config, batch_size=64), jobs)


def test_verdicts_need_more_than_the_interval():
    rows = [row("clip", 0, 0.30), row("clip", 1, 0.32), row("aclip", 0, 0.34), row("aclip", 1, 0.30),
            row("slip", 0, 0.50), row("slip", 1, 0.52), row("flip50", 0, 0.1, tier=2)]  # fmt: skip
    found = {one["recipe"]: one for one in verdicts(rows)}
    assert found["aclip"]["verdict"] == "not testable at this scale" and found["slip"]["verdict"] == "better"
    low, high = found["slip"]["interval"]
    assert low > 0 and (low + high) / 2 == pytest.approx(found["slip"]["difference"]) == pytest.approx(0.2)
    assert {one["recipe"] for one in verdicts(rows, "aclip")} == {"clip", "slip"}
    # tier 2 has no clip of its own here, so nothing is said of it
    assert "flip50" not in found
    mean, error = spread(rows[:2], "toy accuracy")
    assert mean == pytest.approx(0.31) and error == pytest.approx((0.31 * 0.69 / 1000) ** 0.5)
    assert spread([row("clip", 0, 0.3), row("clip", 1, 0.5)], "toy accuracy")[1] == pytest.approx(0.1)
    assert "clip" in as_lines(rows)
    for one in rows:
        one["metrics"]["toy mean_per_class_recall"] = 0.25
        one["num_test"]["toy mean_per_class_recall"] = 300.0
    assert spread(rows[:1], "toy mean_per_class_recall")[1] == pytest.approx((0.25 * 0.75 / 300) ** 0.5)


def test_page_says_what_leaves_zero_out():
    rows = [row("clip", 0, 0.30), row("slip", 0, 0.50), row("flip50", 0, 0.31), row("clip", 0, 0.2, tier=2)]
    setup = {"data": "toys", "batch_size": 8, "num_runs": 5, "num_finished": 4}
    page = as_page(rows, {"against_clip": verdicts(rows)}, setup)
    assert "4 of 5 runs" in page and page.count("\n## Tier") == 2
    lines = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert "50.0 (**+20.0** [15.8, 24.2])" in lines["slip"] and "31.0 (+1.0 [-3.0, 5.0])" in lines["flip50"]


def test_unfinished_runs_are_no_rows_and_macs_are_those_of_the_recipe(tmp_path):
    assert study_rows(tmp_path, [Job("clip", 1, 0)]) == [] and verdicts([]) == []
    plain, masked, tuned = (
        macs_of_run(PretrainConfig(recipe=name, data="flickr8k", tuning=tuning, num_steps=1000).settings())
        for name, tuning in (("clip", 0.0), ("flip50", 0.0), ("flip50", 0.1))
    )
    assert 0.5 < masked / plain < 0.7 and tuned == pytest.approx(0.9 * masked + 0.1 * plain, rel=1e-6)
    settings = PretrainConfig(recipe="flip50", data="flickr8k", tuning=0.1, num_steps=1000).settings()
    assert macs_of_run(settings, 900) == pytest.approx(0.9 * masked, rel=1e-6)


@pytest.mark.parametrize(
    "config, word",
    [
        (PretrainStudyConfig(recipes=("lit",)), "not in the study"),
        (PretrainStudyConfig(tiers=(4,)), "some of 1, 2 and 3"),
        (PretrainStudyConfig(tiers=(1,), recipes=("slip",)), "none of them"),
        (PretrainStudyConfig(minutes=(0.0, 1.0, 1.0)), "positive"),
        (PretrainStudyConfig(minutes=(float("nan"), 1.0, 1.0)), "positive"),
        (PretrainStudyConfig(device="tpu"), "choose cpu or cuda"),
        (PretrainStudyConfig(image_size=63), "--image-size 63"),
        (PretrainStudyConfig(image_size=0), "--image-size 0"),
        (PretrainStudyConfig(batch_size=1), "two pictures"),
    ],
)
def test_bad_studies_are_refused(config, word):
    with pytest.raises(UserError, match=word):
        pretrain_study.main(config)


def test_bad_cost_settings_are_refused():
    with pytest.raises(UserError, match="choose among clip"):
        pretrain_cost.main(PretrainCostConfig(recipes=("glip",)))
    with pytest.raises(UserError, match="2 or more"):
        pretrain_cost.main(PretrainCostConfig(batch_size=1))


def test_a_timed_step_trains_what_the_recipe_trains():
    moments = {}
    pair = towers_of(small_config("clip", 2))
    for name in ("aclip_fast", "lit"):
        ready = build(small_config(name, 2), pair, moments)
        assert step_seconds(ready) > 0
        assert (pair.tower.patch.weight.grad is None) == (name == "lit")
        assert all(parameter.grad is not None for parameter in ready.learner.parameters() if parameter.requires_grad)
    assert pair.text.position in moments


@pytest.mark.system
def test_study_command_stops_and_goes_on(tmp_path):
    folder = write_pairs(tmp_path / "pairs")
    rows = json.loads((folder / "captions.json").read_text())
    for number, name in enumerate(sorted(rows)):
        rows[name]["split"] = "test" if number >= 24 else "train"
    (folder / "captions.json").write_text(json.dumps(rows))
    config = PretrainStudyConfig(data="captions", data_root=folder, recipes=("clip", "flip50"), tiers=(1,),
                                 seeds=(1, 1, 1), minutes=(0.005, 0.005, 0.005), batch_size=8, rounds=1,
                                 out=tmp_path / "study")  # fmt: skip
    former = torch.get_num_threads()
    try:
        pretrain_study.main(replace(config, recipes=("clip",)))
        first = json.loads((tmp_path / "study/pretrain_study.json").read_text())["rows"]
        # what a study needs of a finished run is its manifest and its log: it may go on where only these were taken to
        for path in (tmp_path / "study/runs/tier1-clip-seed0").iterdir():
            if path.name not in ("clip.json", "log.jsonl"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        pretrain_study.main(config)
    finally:
        torch.set_num_threads(former)
    assert not (tmp_path / "study/runs/tier1-clip-seed0/clip.safetensors").exists()
    found = json.loads((tmp_path / "study/pretrain_study.json").read_text())
    assert [row["recipe"] for row in found["rows"]] == ["clip", "flip50"] and found["num_finished"] == 2
    assert found["rows"][:1] == first
    for row in found["rows"]:
        assert row["steps"] >= 2 and row["seconds"] > 0 and row["macs"] > 0 and "captions t2i@5" in row["metrics"]
    assert {one["metric"] for one in found["against_clip"]} == set(found["rows"][0]["metrics"])
    assert "2 of 2 runs" in (tmp_path / "study/pretrain_study.md").read_text()


@pytest.mark.system
def test_cost_command_writes_its_table(tmp_path):
    config = PretrainCostConfig(recipes=("flip50", "aclip_fast"), small=True, rounds=2, batch_size=4, threads=1,
                                out=tmp_path)  # fmt: skip
    former = torch.get_num_threads()
    try:
        pretrain_cost.main(config)
    finally:
        torch.set_num_threads(former)
    found = json.loads(Path(tmp_path / "pretrain_cost.json").read_text())
    assert [row["recipe"] for row in found["rows"]] == ["clip", "flip50", "aclip_fast"]
    assert found["rows"][0]["time_ratio"] == found["rows"][0]["memory_ratio"] == 1.0
    assert found["rounds"] == 2 and found["rows"][1]["reported_time_ratio"] == 0.5
    assert {"command", "versions", "threads"} <= found.keys()


def test_peak_memory_is_that_of_the_process_and_not_of_its_parent():
    """Linux's ru_maxrss of a young process is what its parent had: here 300 MB for a process that needs a few."""
    ballast = bytearray(300 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    imports = "import resource, sys\nfrom pathlib import Path\n"
    code = f"{imports}{inspect.getsource(peak_resident)}\nprint(peak_resident())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(found.stdout) < 150 << 20
    assert peak_resident() > 300 << 20


def test_a_finished_run_of_other_minutes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_study, "_step_seconds", lambda _, names: dict.fromkeys(names, 0.5))
    config = PretrainStudyConfig(out=tmp_path, recipes=("clip",), tiers=(1,), seeds=(1, 1, 1), minutes=(1.0, 1.0, 1.0))
    run = tmp_path / "runs" / "tier1-clip-seed0"
    run.mkdir(parents=True)
    (run / "clip.json").write_text(json.dumps({"recipe": {"settings": {"num_steps": 60}}}))
    with pytest.raises(UserError, match="has 60 steps, --minutes asks for 120"):
        pretrain_study.main(config)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json: does not read"):
        pretrain_study.main(config)


@pytest.mark.system
def test_a_killed_study_leaves_no_run_behind(tmp_path):
    """`kill -9` of the study ends its runs, whose folders are then free."""
    folder = write_pairs(tmp_path / "pairs")
    words = [sys.executable, "-m", "eval", "pretrain-study", "--data", "captions", "--data-root", str(folder),
             "--recipes", "clip", "--tiers", "1", "--minutes", "60", "1", "1", "--batch-size", "8", "--rounds", "1",
             "--out", str(tmp_path / "study")]  # fmt: skip
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as study:
        log = tmp_path / "study/runs/tier1-clip-seed0/log.jsonl"
        deadline = time.monotonic() + 240
        while not log.exists() and study.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        assert log.exists(), "the run has begun"
        lock = FileLock(log.parent / ".lock", timeout=0)
        with pytest.raises(Timeout):
            lock.acquire()
        study.kill()
    FileLock(log.parent / ".lock", timeout=30).acquire()
