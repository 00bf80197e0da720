"""`python -m eval trained` end to end on a tiny saved model: rows, paired intervals, seeds, resume, refusals."""

import json
from dataclasses import replace

import pytest
import torch
from made_files import make_files
from test_predictors_train import clip, draw, model  # noqa: F401 (fixtures)

from eval import trained as command
from eval.journal import Journal
from eval.probe import ProbeConfig
from eval.trained import TrainedConfig, main, plan_of
from eval.trained_answers import pooled_journals, with_answers
from eval.trained_methods import Entry, saved_entries
from eval.trained_rows import make_rows
from patchrank.errors import UserError
from patchrank.macs import dense_macs
from patchrank.search.config import SearchConfig
from patchrank.spec import PruneSpec
from predictors import load_pruned
from predictors.calibrate import calibrate
from predictors.config import CalibrateConfig, TrainConfig
from predictors.costs import share_of_macs
from predictors.train import train

ROW = {"method", "family", "mode", "budget", "rest", "select", "cuts", "keep", "num_added", "image_macs", "trained_on"}
ROW |= {"acc1", "acc1_ci95", "paired_diff_ci95", "feature_cosine", "top1_agreement", "ms_batch16", "seeds"}


@pytest.fixture(scope="module")
def runs(model, clip, tmp_path_factory) -> TrainConfig:  # noqa: F811
    """Two seeds of a frozen scorer and one calibration, at one budget."""
    folder = tmp_path_factory.mktemp("runs")
    draw(folder / "data", 20)
    shared = dict(data="folder", data_root=folder / "data", split="all", held_out=4, batch_size=4, num_steps=1)
    config = TrainConfig(model=str(model), macs=0.8, scorer="linear", save_every=1, **shared)
    for seed in (0, 1):
        train(replace(config, seed=seed, out=folder / f"seed{seed}"), clip)
    calibrate(CalibrateConfig(pruned=folder / "seed0", out=folder / "calibrated", save_every=1, **shared), clip)
    names = ("seed0", "seed1", "calibrated")
    return TrainedConfig(
        model=str(model),
        data="folder",
        data_root=folder / "data",
        limit=6,
        macs=(0.8, 0.7),
        trained=tuple(folder / name for name in names),
        rivals=("ours", "tome"),
        scorers=("salient", "random"),
        batch_size=4,
        threads=1,
    )


def report(config: TrainedConfig) -> dict:
    return json.loads((config.out / "predictors.json").read_text())


def test_rows_of_all_kinds_and_a_second_run_that_measures_nothing(runs, clip, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    config = replace(runs, out=tmp_path, time_batches=1)
    main(config)
    found = report(config)
    assert found["num_images"] == 6 and found["dense_image_macs"] == dense_macs(clip.tower.config)
    assert all(row.keys() >= ROW for row in found["rows"]) and 0 <= found["dense_acc1"] <= 1
    kinds = {(row["method"], row["mode"], row["rest"], row["budget"]) for row in found["rows"]}
    assert len(kinds) == len(found["rows"])
    frozen = [row for row in found["rows"] if row["mode"] == "frozen"]
    assert {(row["budget"], tuple(row["seeds"])) for row in frozen} == {(0.8, (0, 1)), (0.7, (0, 1))}
    assert [row["budget"] for row in found["rows"] if row["mode"] == "calibrated"] == [0.8]
    for row in found["rows"]:
        assert row["image_macs"] <= 1.03 * row["budget"] * found["dense_image_macs"] and row["ms_batch16"] > 0
        low, high = row["paired_diff_ci95"]
        assert low <= row["acc1"] - found["dense_acc1"] <= high
        if row["family"] == "ours":
            assert row["cosine_behind"][row["mode"]]["mean"] >= -1e-7 or row["rest"] == "drop"
    assert "linear scorer (calibrated, fold)" in capsys.readouterr().out
    monkeypatch.setattr(command, "_judge", lambda *_: pytest.fail("measured again"))
    main(replace(config, time_batches=0, measure=False, rivals=("ours", "tome", "evit")))
    assert [row["feature_cosine"] for row in report(config)["rows"]] == [row["feature_cosine"] for row in found["rows"]]


def test_rows_are_paired_means_over_seeds(tmp_path) -> None:
    journal = Journal(tmp_path / "j.jsonl", ("batch", "method", "macs"))
    spec = PruneSpec(cuts=((1, 0.5),))
    shared = dict(
        method="m", family="ours", mode="frozen", budget=0.7, image_macs=1, run=torch.nn.Identity(), spec=spec
    )
    entries = [Entry(seed=seed, **shared) for seed in (0, 1)]
    rival = Entry(**(shared | dict(method="r", family="rival", mode="training-free", spec=None)))
    hits = {entries[0].key: [1, 0, 1], entries[1].key: [1, 1, 1], rival.key: [0, 0, 0]}
    cosines = {entries[0].key: [0.9, 0.8, 0.7], entries[1].key: [1.0, 0.8, 0.7], rival.key: [0.5, 0.5, 0.5]}
    journal.add({"batch": 0, "method": "dense", "macs": 1.0, "hit": [1, 1, 1]})
    for key, hit in hits.items():
        journal.add({"batch": 0, "method": key, "macs": 0.7, "cosine": cosines[key], "agrees": hit, "hit": hit})
    ours, other = make_rows(journal, [*entries, rival], {})
    assert ours["seeds"] == [0, 1] and ours["acc1"] == pytest.approx(5 / 6)
    assert ours["feature_cosine"] == pytest.approx((0.95 + 0.8 + 0.7) / 3)
    assert other["cosine_behind"]["frozen"]["mean"] == pytest.approx(ours["feature_cosine"] - 0.5)
    assert other["paired_diff_ci95"] == [-1.0, -1.0] and other["rest"] is None
    assert ours["cosine_behind"]["frozen"]["ci95"] == [0.0, 0.0]


def entry(seed: int | None) -> Entry:
    return Entry(
        method="m", family="ours", mode="frozen", budget=0.7, image_macs=1, run=torch.nn.Identity(),
        spec=PruneSpec(cuts=((1, 0.5),)), seed=seed,
    )  # fmt: skip


def journal_of(path, hits: dict[int, list[int]], dense: list[int]) -> Journal:
    journal = Journal(path, ("batch", "method", "macs"))
    journal.add({"batch": 0, "method": "dense", "macs": 1.0, "hit": dense})
    for seed, hit in hits.items():
        shared = {"batch": 0, "method": entry(seed).key, "macs": 0.7}
        journal.add(shared | {"cosine": [0.5 + one / 2 for one in hit], "agrees": hit, "hit": hit})
    return journal


def test_pooled_rows_weigh_every_image_alike(tmp_path) -> None:
    own = journal_of(tmp_path / "a", {0: [1, 0], 1: [1, 1]}, [1, 1])
    other = journal_of(tmp_path / "b", {0: [0, 0, 0], 1: [0, 0, 1]}, [1, 0, 0])
    (row,) = make_rows(own, [entry(0), entry(1)], {}, {"other": other})
    pooled = row["pooled"]
    assert pooled["num_images"] == 5 and pooled["acc1"] == pytest.approx((1 + 0.5 + 0 + 0 + 0.5) / 5)
    assert pooled["paired_diff"] == pytest.approx((0 - 0.5 - 1 + 0 + 0.5) / 5)
    low, high = pooled["paired_diff_ci95"]
    assert -1 <= low < pooled["paired_diff"] < high <= 0.5
    assert pooled["feature_cosine"] == pytest.approx(0.5 + pooled["acc1"] / 2)
    (row,) = make_rows(own, [entry(0), entry(1)], {}, {"other": journal_of(tmp_path / "c", {0: [1]}, [1])})
    assert row["pooled"] is None
    (row,) = make_rows(own, [entry(0), entry(1)], {})
    assert "pooled" not in row


def test_runs_to_pool_are_of_the_same_weights_and_of_other_data(runs, clip, tmp_path) -> None:  # noqa: F811
    config = replace(runs, macs=(0.8,), trained=(), scorers=(), rivals=("ours",), limit=4)
    main(replace(config, out=tmp_path / "one"))
    (first,) = report(replace(config, out=tmp_path / "one"))["rows"]
    main(replace(config, limit=6, out=tmp_path / "two", pool=(tmp_path / "one",)))
    (row,) = report(replace(config, out=tmp_path / "two"))["rows"]
    assert row["pooled"]["num_images"] == 10
    assert row["pooled"]["acc1"] == pytest.approx((4 * first["acc1"] + 6 * row["acc1"]) / 10)
    own = {"weights_hash": clip.weights_hash, "images": "others"}
    assert report(replace(config, out=tmp_path / "two"))["pooled_with"] == ["folder"]
    with pytest.raises(UserError, match="holds no run"):
        pooled_journals([tmp_path], own)
    with pytest.raises(UserError, match="measured with other weights"):
        pooled_journals([tmp_path / "one"], own | {"weights_hash": "0" * 64})
    with pytest.raises(UserError, match="holds the images of this run"):
        main(replace(config, out=tmp_path / "three", pool=(tmp_path / "one",)))
    with pytest.raises(UserError, match="give each data set once"):
        pooled_journals([tmp_path / "one", tmp_path / "two"], own)


def test_a_probe_answers_where_the_model_has_no_classes() -> None:
    plan, _ = plan_of(SearchConfig(limit=60, split="test"), 16)
    same, about = with_answers(plan, ProbeConfig())
    assert same is plan and not about
    plan = replace(plan, job=replace(plan.job, logits=None))
    fit = ProbeConfig(fit_limit=300, Cs=(0.1,), cache=None)
    told, about = with_answers(plan, fit)
    assert about["num_fit_images"] == 300 and about["C"] == 0.1
    picture = torch.stack([plan.clip.preprocess(plan.dataset.open(item.id)) for item in plan.items])
    with torch.no_grad():
        answer_I = told.job.logits(plan.clip.tower(picture)).argmax(-1)
    hit_I = answer_I == torch.tensor([item.label for item in plan.items])
    assert hit_I.double().mean() > 0.7
    assert with_answers(plan, replace(fit, fit_limit=0))[0] is plan
    with pytest.raises(UserError, match="judge on test or val"):
        with_answers(replace(plan, dataset=replace(plan.dataset, split="train")), fit)


def test_rows_that_need_files_get_them_and_say_so_if_not(runs, clip, tmp_path) -> None:  # noqa: F811
    files = make_files(tmp_path / "files", clip.tower, (0.8,))
    names = ("dtem", "dtem-calibrated", "drop-centre-calibrated", "tome")
    given = tuple(f"{name}={path}" for name, path in files.items())
    main(replace(runs, macs=(0.8,), trained=(), scorers=(), rivals=names, files=given, out=tmp_path / "given"))
    found = report(replace(runs, out=tmp_path / "given"))
    modes = {row["method"]: row["mode"] for row in found["rows"]}
    assert modes == dict(zip(names, ("frozen", "calibrated", "calibrated", "training-free"))) and not found["missing"]
    main(replace(runs, macs=(0.7,), trained=(), scorers=(), rivals=names, files=given, out=tmp_path / "other"))
    (calibrated, _) = report(replace(runs, out=tmp_path / "other"))["missing"]
    assert calibrated.startswith(f"dtem-calibrated at 0.7: {files['calibrated-rivals'].name}: has no calibration")
    main(replace(runs, macs=(0.8,), trained=(), scorers=(), rivals=names, out=tmp_path / "none"))
    found = report(replace(runs, out=tmp_path / "none"))
    assert [row["method"] for row in found["rows"]] == ["tome"]
    assert found["missing"][0].startswith(
        "dtem at 0.8: skipped, needs a trained embedding: python -m eval.rivals.train"
    )


def test_a_tower_made_for_a_budget_is_not_mixed_up_with_one_brought_to_it(runs, clip, tmp_path) -> None:  # noqa: F811
    record = json.loads((runs.trained[0] / "training.json").read_text())["training"]
    kept = {name: record[name] for name in ("scorer", "held_out", "batch_size", "num_steps", "save_every", "split")}
    config = TrainConfig(model=runs.model, data="folder", data_root=runs.data_root, **kept)
    train(replace(config, cuts="1:12,2:9", where="inside", out=tmp_path / "own"), clip)
    own = share_of_macs(load_pruned(tmp_path / "own"))
    for order in ((tmp_path / "own", runs.trained[0]), (runs.trained[0], tmp_path / "own")):
        entries = {entry.budget: entry for entry in saved_entries(clip, (0.8, own), order)}
        assert entries[own].spec.counts(16) == [(1, 12), (2, 9)] and len(entries) == 2
        assert entries[0.8].spec == load_pruned(runs.trained[0]).spec
    with pytest.raises(UserError, match=r"the same method, mode and seed at 0\.8; leave one out"):
        saved_entries(clip, (0.8,), (runs.trained[0], runs.trained[0]))


def test_what_was_trained_otherwise_is_a_method_of_its_own(runs, clip, tmp_path) -> None:  # noqa: F811
    record = json.loads((runs.trained[2] / "training.json").read_text())["calibration"]
    kept = {name: record[name] for name in ("held_out", "batch_size", "num_steps", "save_every", "split")}
    kept |= dict(data="folder", data_root=runs.data_root)
    plain = CalibrateConfig(pruned=runs.trained[0], size_bias=False, out=tmp_path / "plain", **kept)
    corrected = CalibrateConfig(pruned=runs.trained[0], lora_rank=2, out=tmp_path / "corrected", **kept)
    for config in (plain, corrected):
        calibrate(config, clip)
    one = TrainConfig(model=runs.model, scorer="linear", keep_range=(0.5, 0.5), macs=0.8, out=tmp_path / "one", **kept)
    train(one, clip)
    folders = (runs.trained[2], plain.out, corrected.out, one.out)
    names = [entry.method.removeprefix("linear scorer") for entry in saved_entries(clip, (0.8,), folders)]
    assert names == ["", ", no size bias", ", rank 2", ", for one keep rate"]


def test_towers_of_other_weights_and_unknown_names_are_refused(runs, tmp_path) -> None:
    with pytest.raises(UserError, match="was trained for other weights"):
        main(replace(runs, model="embedded", data="digits", data_root=None, out=tmp_path / "a"))
    with pytest.raises(UserError, match="--scorers psychic: unknown; choose from random"):
        main(replace(runs, scorers=("psychic",), out=tmp_path / "b"))
    with pytest.raises(UserError, match="--macs 7: must lie in"):
        main(replace(runs, macs=(7.0,), out=tmp_path / "c"))
