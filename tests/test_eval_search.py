"""eval/: `search-cost` and `search-truth` end to end on a tiny saved model, and the pure parts one by one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tower
from test_macs import counted, meta_tower
from test_search_cli import pictures, save_tiny  # noqa: F401 (a fixture)

from eval import search_cost, search_truth
from eval.__main__ import COMMANDS
from eval.__main__ import main as eval_main
from eval.cost_measure import search as cost_measure_search
from eval.journal import Journal
from eval.orders import ENTRIES, EXACT, FREE, entry_of, free_names, free_orders
from eval.quality import AUC_KEEPS, CURVE_KEEPS, auc, best_free, recovered_headroom
from eval.search_cost import SearchCostConfig
from eval.search_truth import SearchTruthConfig
from eval.truth_report import sentences
from eval.truth_rows import TRUTH_KEEPS, TruthRow, bend, peak, wins
from eval.uncached import (
    alive_mask,
    cached_macs,
    in_full,
    integrate,
    lengths,
    uncached_features,
    uncached_macs,
)
from patchrank.errors import UserError
from patchrank.macs import pruned_macs
from patchrank.pruned import PrunedTower
from patchrank.search.__main__ import main as search_main
from patchrank.search.config import SearchConfig
from patchrank.search.cost import strategy_cost
from patchrank.search.criteria import CRITERIA
from patchrank.search.greedy import removals
from patchrank.search.plan import make_plan
from patchrank.search.runner import run_search
from patchrank.search.store import RankingMismatch, shard_path
from patchrank.search.strategies import STRATEGIES
from patchrank.search.sweep_all import run_sweep_all
from patchrank.search.variants import prepare
from patchrank.spec import RESTS, PruneSpec
from patchrank.tower import TowerConfig, VisionTower


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A CLIP of 16 patches with random weights."""
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", 32)


@pytest.fixture
def cost(model: Path, pictures: Path, tmp_path: Path) -> SearchCostConfig:  # noqa: F811
    return SearchCostConfig(
        model=str(model),
        data="folder",
        data_root=pictures,
        limit=None,
        rest=("drop",),
        strategies=("sweep",),
        time=False,
        threads=1,
        out=tmp_path / "cost",
    )


def results(config) -> dict:
    name = "search_cost.json" if isinstance(config, SearchCostConfig) else "search_truth.json"
    return json.loads((config.out / name).read_text())


def rows_of(config: SearchCostConfig, rest: str = "drop") -> dict[str, dict]:
    return {row["strategy"]: row for row in results(config)["rows"] if row["rest"] == rest}


def search_config(config, **changes) -> SearchConfig:
    shared = dict(model=config.model, data=config.data, data_root=config.data_root, limit=config.limit, threads=1)
    return SearchConfig(**(shared | dict(shard_size=2) | changes))


# --- closed forms and rounds


def test_closed_forms_give_the_published_sizes() -> None:
    config = TowerConfig(image_size=(224, 224), patch_size=16, width=192, num_layers=12, num_heads=3, mlp_width=768)
    with torch.device("meta"):
        tower = VisionTower(config)
    spec = PruneSpec(cuts=((3, 1.0),), rest="drop")
    assert round(uncached_macs(config, spec) / 1e12, 1) == 17.8
    assert round(cached_macs(tower, spec) / 1e12, 1) == 10.3


@pytest.mark.parametrize("kind", ["class", "mean", "attention"])
@pytest.mark.parametrize("rest", RESTS)
def test_an_uncached_round_computes_what_the_closed_form_counts(kind: str, rest: str) -> None:
    tower, spec = meta_tower(kind), PruneSpec(cuts=((1, 1.0),), rest=rest)
    keep = 11 / tower.config.num_patches
    image_BCHW = torch.empty(12, 3, *tower.config.image_size, device="meta")
    score_BN = torch.empty(12, tower.config.num_patches, device="meta")
    pruned = PrunedTower(tower, spec.with_keep(keep), None)
    expected = 12 * pruned_macs(tower.config, spec.with_keep(keep), class_row_only=False)
    assert counted(lambda: in_full(pruned, image_BCHW, score_BN)) == expected


@pytest.mark.parametrize("pool", [{}, dict(pool="mean", num_prefix=0), dict(pool="attention", num_prefix=0)])
@pytest.mark.parametrize("rest", RESTS)
def test_uncached_features_equal_the_cached_ones(pool: dict, rest: str, images: torch.Tensor) -> None:
    tower, spec = make_tower(**pool), PruneSpec(cuts=((2, 1.0),), rest=rest)
    order_N = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        variants = prepare(tower, images[0], spec, 5)
        for num_alive in (16, 7, 2):
            _, mask_AN = removals(alive_mask(order_N, num_alive))
            slow_AD = uncached_features(tower, images[0], spec, mask_AN, 5)
            torch.testing.assert_close(slow_AD, variants.features(mask_AN), rtol=1e-4, atol=1e-5)


def test_alive_are_the_first_of_the_order() -> None:
    assert alive_mask(torch.tensor([2, 0, 1, 3], dtype=torch.int16), 2).tolist() == [True, False, True, False]


@pytest.mark.parametrize("chunk", [1, 16])
def test_integration_is_exact_where_seconds_per_row_are_linear(chunk: int) -> None:
    def seconds(A: int) -> float:
        rows = A if A <= chunk else -(-A // chunk) * chunk
        return rows * (0.5 + 0.01 * A)

    every = sum(seconds(A) for A in range(2, 197))
    at = lengths(196)
    assert at[0] == 196 and at[-1] == 4 and len(at) == 13
    known = {A: seconds(A) for A in [*at, 2]}
    assert integrate(known, 196, chunk) == pytest.approx(every)
    assert integrate({A: seconds(A) for A in at}, 196, chunk) == pytest.approx(every, rel=1e-3)


# --- journal


def test_a_journal_comes_back_without_its_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    journal = Journal(path, ("image", "rest"))
    journal.add({"image": "a", "rest": "drop", "value": 1}, {"image": "b", "rest": "drop", "value": 2})
    with open(path, "a") as file:
        file.write('{"image": "c", "re')
    again = Journal(path, ("image", "rest"))
    assert [record["value"] for record in again] == [1, 2]
    assert ("a", "drop") in again and ("c", "drop") not in again and again.get("c", "drop") is None
    again.add({"image": "c", "rest": "drop", "value": 3})
    assert len(Journal(path, ("image", "rest"))) == 3


@pytest.mark.parametrize("line", ["{broken}", '{"image": "a"}', "3"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "j.jsonl").write_text('{"image": "a", "rest": "drop"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2 is damaged"):
        Journal(tmp_path / "j.jsonl", ("image", "rest"))


# --- where orders come from


def test_every_strategy_has_a_row_and_finds_it_again() -> None:
    assert {entry.strategy for entry in ENTRIES.values()} == set(STRATEGIES)
    for name, entry in ENTRIES.items():
        options = json.loads(json.dumps(STRATEGIES[entry.strategy].options(entry.options)))
        assert entry_of({"strategy": entry.strategy, "options": options}) == name
    with pytest.raises(RankingMismatch, match="no row"):
        entry_of({"strategy": "greedy", "options": {"step": 3, "decay": False}})


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("rest", RESTS)
def test_free_orders_are_permutations_fixed_by_the_seed(name: str, rest: str, tower, images) -> None:
    variants = prepare(tower, images[0], PruneSpec(cuts=((1, 1.0),), rest=rest))
    order_RN = free_orders(variants, name, 5)
    assert order_RN.sort(1).values.tolist() == [list(range(16))] * len(order_RN)
    assert torch.equal(order_RN, free_orders(variants, name, 5))


def test_a_tower_without_prefix_has_no_class_attention() -> None:
    assert set(free_names(1)) - set(free_names(0)) == {"class-attention"}


# --- quality


def test_auc_reads_its_own_part_of_the_curve() -> None:
    outside = [keep for keep in CURVE_KEEPS if keep not in AUC_KEEPS]
    cosine_IM = torch.tensor([[0.0 if keep in outside else keep for keep in CURVE_KEEPS]])
    assert auc(cosine_IM).item() == pytest.approx(0.5)  # the mean of y = x over 0.3 .. 0.7


def test_recovered_headroom_of_known_values() -> None:
    free_I, exact_I = torch.tensor([0.5, 0.7, 0.6]), torch.tensor([0.9, 1.0, 0.8])
    half = recovered_headroom((free_I + exact_I) / 2, free_I, exact_I)
    assert half.quality == pytest.approx(0.5) and half.quality_interval == pytest.approx((0.5, 0.5))
    assert half.auc == pytest.approx(0.75)
    assert recovered_headroom(exact_I, free_I, exact_I).quality == pytest.approx(1.0)
    assert recovered_headroom(free_I, free_I, exact_I).quality == pytest.approx(0.0)
    assert recovered_headroom(free_I, exact_I, free_I).quality is None


def test_the_best_free_scorer_is_that_of_the_highest_mean() -> None:
    assert best_free({"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.4, 0.7])}) == "b"


# --- search-cost


def test_all_rows_are_measured_and_timed(cost: SearchCostConfig, capsys) -> None:
    config = replace(cost, limit=3, strategies=tuple(ENTRIES), time=True, time_images=1, full_image=True)
    search_cost.main(config)
    found, rows = results(config), rows_of(config)
    assert list(rows) == ["greedy-1-uncached", *ENTRIES, *FREE, "mean-rank"]
    for name in ("greedy-1-uncached", EXACT):
        assert rows[name]["quality"] == 1.0 and rows[name]["kendall_tau"] == 1.0
        assert rows[name]["seconds_source"] == "extrapolated" and rows[name]["seconds_full_image"] > 0
    assert max(rows[name]["auc"] for name in [*FREE, "mean-rank"]) == rows["sweep"]["auc_free"]
    assert rows[rows["sweep"]["best_free"]]["quality"] == 0.0
    for name in ENTRIES:
        assert rows[name]["seconds_per_image"] > 0 and rows[name]["num_timed"] == 1
        uncached = rows["greedy-1-uncached"]["macs_per_image"]
        assert rows[name]["times_fewer_macs"]["greedy-1-uncached"] == uncached / rows[name]["macs_per_image"]
    for name in (EXACT, "greedy-8", "greedy-16-decay", "sweep", "gradient"):  # those that do not adapt to the image
        plan = make_plan(search_config(config, rest="drop", **vars(ENTRIES[name])))
        assert rows[name]["macs_per_image"] == strategy_cost(plan.job).macs
    assert all(rows[name]["macs_per_image"] == 0 and rows[name]["criterion"] is None for name in FREE)
    assert all(list(row["acc1_at_keep"]) == ["0.8", "0.6", "0.4"] for row in rows.values())
    assert found["threads"] == 1 and found["num_images"] == 2 and found["command"].startswith("python -m eval")
    assert (config.out / "search_cost.png").read_bytes().startswith(b"\x89PNG")
    assert len((config.out / "search_cost.csv").read_text().splitlines()) == 1 + len(rows)
    assert "has quality" in capsys.readouterr().out and "| sweep |" in (config.out / "search_cost.md").read_text()


@pytest.fixture
def searched(monkeypatch) -> list[str]:
    """Strategies that `search-cost` has run, one entry an image."""
    names = []

    def search(job, *more):
        names.append(job.strategy)
        return cost_measure_search(job, *more)

    monkeypatch.setattr("eval.cost_measure.search", search)
    return names


def test_a_second_run_adds_only_what_is_missing(cost: SearchCostConfig, searched: list[str]) -> None:
    both = replace(cost, rest=RESTS)
    search_cost.main(replace(both, limit=3))
    first, num_first = (cost.out / "worths.jsonl").read_bytes(), results(cost)["num_images"]
    assert searched == ["greedy", "sweep"] * 2 * num_first
    searched.clear()
    search_cost.main(replace(both, limit=3))
    assert searched == [] and (cost.out / "worths.jsonl").read_bytes() == first
    search_cost.main(replace(both, limit=None))
    assert len(searched) == 4 * (4 - num_first)
    assert (cost.out / "worths.jsonl").read_bytes().startswith(first)
    assert results(cost)["num_images"] == 4 and results(cost)["broken"] == ["cat/broken.png"]
    assert rows_of(cost)["sweep"]["seconds_source"] == "not timed"
    searched.clear()
    search_cost.main(replace(both, time=True, time_images=2))
    assert [rows_of(cost, rest)["sweep"]["num_timed"] for rest in RESTS] == [2, 2]
    assert searched.count("sweep") == 4 and searched.count("greedy") == 0  # exact greedy is timed by rounds


def test_another_seed_does_not_mix_with_what_is_there(cost: SearchCostConfig) -> None:
    search_cost.main(replace(cost, limit=2))
    with pytest.raises(RankingMismatch, match=r"seed 0 \(now 1\)"):
        search_cost.main(replace(cost, limit=2, seed=1))


@pytest.fixture
def exact_store(cost: SearchCostConfig) -> Path:
    config = search_config(cost, rest="drop", strategy="greedy", out=cost.out / "exact")
    search_main(config)
    return config.out


def test_stored_orders_are_used_instead_of_searching(
    cost: SearchCostConfig, exact_store: Path, searched: list[str]
) -> None:
    search_cost.main(replace(cost, out=cost.out / "searched"))
    searched.clear()
    (exact_store / "manifest.json").unlink()
    shard_path(exact_store, 0).unlink()  # the images of the first shard are not there yet
    stored = replace(cost, stores=(exact_store,), partial=True, out=cost.out / "stored")
    with pytest.raises(RankingMismatch, match=r"no manifest\.json"):
        search_cost.main(replace(stored, partial=False))
    search_cost.main(stored)
    num_images = results(stored)["num_images"]
    assert 1 <= num_images < 4 and searched == ["sweep"] * num_images
    key = ("image", "rest", "ranking")
    apart = Journal(cost.out / "searched" / "worths.jsonl", key)
    assert all(one == apart.get(*(one[name] for name in key)) for one in Journal(stored.out / "worths.jsonl", key))


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(layer=2), "made for layer 1, not 2"),
        (dict(criterion="label"), "made with criterion preservation"),
        (dict(seed=3), "made with seed 0, not 3"),
    ],
)
def test_a_store_that_does_not_fit_is_refused(cost, exact_store: Path, changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        search_cost.main(replace(cost, stores=(exact_store,), **changes))


def test_a_store_of_other_images_is_refused(cost, exact_store: Path) -> None:
    for path in (exact_store / "shards").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="hold none of the 5 images"):
        search_cost.main(replace(cost, stores=(exact_store,), partial=True))


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(strategies=("astar",)), "--strategies astar: unknown; choose from greedy-1, "),
        (dict(rest=("melt",)), "--rest melt: must be"),
        (dict(rest=()), "--rest"),
        (dict(rest=("drop", "drop")), "--rest drop drop"),
        (dict(time_images=0), "--time-images 0"),
        (dict(criterion="luck"), "--criterion luck: unknown"),
        (dict(limit=0), "--limit 0"),
    ],
)
def test_values_outside_their_rule_are_refused(cost, changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        search_cost.main(replace(cost, **changes))


def test_only_broken_images_leave_nothing_to_measure(cost, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="all 1 images are broken"):
        search_cost.main(replace(cost, data_root=tmp_path / "bad"))


def test_a_flat_folder_has_no_accuracy_but_all_else(cost, tmp_path: Path, pictures: Path) -> None:  # noqa: F811
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes((pictures / "cat" / "a.png").read_bytes())
    search_cost.main(replace(cost, data_root=tmp_path / "flat"))
    row = rows_of(cost)["sweep"]
    assert row["acc1_at_keep"] is None and row["quality"] is not None and "mean-rank" not in rows_of(cost)


# --- one sweep for all criteria


def test_one_pass_writes_the_bytes_of_one_sweep_per_criterion(cost: SearchCostConfig) -> None:
    configs = {name: search_config(cost, criterion=name, strategy="sweep") for name in CRITERIA}
    plans = {name: make_plan(config) for name, config in configs.items()}
    stores = {name: cost.out / "all" / name for name in CRITERIA}
    run_sweep_all(plans, stores, quiet=True)
    lost = shard_path(stores["label"], 1)
    kept = lost.read_bytes()
    lost.unlink()
    run_sweep_all(plans, stores, quiet=True)
    assert lost.read_bytes() == kept
    for name, plan in plans.items():
        run_search(plan.job, plan.items, plan.request, cost.out / "alone" / name, quiet=True)
        assert files(stores[name]) == files(cost.out / "alone" / name)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_pass_refuses_plans_that_differ_in_more(cost: SearchCostConfig) -> None:
    first = search_config(cost, strategy="sweep")
    for other in (replace(first, seed=1), replace(first, strategy="regression")):
        plans = {"one": make_plan(first), "two": make_plan(other)}
        with pytest.raises(UserError, match="one sweep for several criteria"):
            run_sweep_all(plans, {"one": cost.out / "1", "two": cost.out / "2"})


# --- search-truth


@pytest.fixture
def truth(cost: SearchCostConfig) -> SearchTruthConfig:
    return SearchTruthConfig(
        model=cost.model, data="folder", data_root=cost.data_root, threads=1, shard_size=2, out=cost.out / "truth"
    )


def test_truth_of_all_criteria(truth: SearchTruthConfig, exact_store: Path, capsys) -> None:
    search_truth.main(replace(truth, stores=(exact_store,)))
    rows = results(truth)["rows"]
    names = {(row["rest"], row["strategy"], row["criterion"]) for row in rows}
    searches = {(strategy, name) for strategy in ("sweep", "joint") for name in CRITERIA}
    searches |= {("checkerboard", None), ("random", None)}
    assert names == {(rest, *one) for rest in RESTS for one in searches} | {("drop", EXACT, "preservation")}
    for row in rows:
        assert row["num_images"] == 4 and list(row["acc1_at_keep"]) == ["1", *(f"{keep:g}" for keep in TRUTH_KEEPS)]
        assert row["acc1_at_keep"]["1"] == row["dense_acc1"] and row["minus_dense_interval_at_keep"]["1"] == [0, 0]
        for keep, acc1 in row["acc1_at_keep"].items():
            assert row["minus_dense_at_keep"][keep] == pytest.approx(acc1 - row["dense_acc1"])
            low, high = row["acc1_interval_at_keep"][keep]
            assert low <= acc1 <= high
        if row["strategy"] == "checkerboard":
            assert set(row["minus_checkerboard_at_keep"].values()) == {0.0}
    assert results(truth)["broken"] == ["cat/broken.png"]
    assert (truth.out / "search_truth.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "sweep label (drop): " in out and "sweep preservation (fold): " in out
    before = (truth.out / "judged.jsonl").read_bytes()
    search_truth.main(replace(truth, stores=(exact_store,)))
    assert (truth.out / "judged.jsonl").read_bytes() == before


def truth_row(minus: dict[str, float], low_high: dict[str, tuple]) -> TruthRow:
    acc1 = {keep: 0.7 + value for keep, value in minus.items()}
    return TruthRow(
        strategy="sweep",
        criterion="label",
        rest="drop",
        num_images=10,
        dense_acc1=0.7,
        acc1_at_keep=acc1,
        acc1_interval_at_keep=low_high,
        cosine_at_keep=acc1,
        minus_dense_at_keep=minus,
        minus_dense_interval_at_keep=low_high,
        minus_checkerboard_at_keep=minus,
        minus_checkerboard_interval_at_keep=low_high,
    )


def test_what_a_curve_says() -> None:
    spread = {"1": (0, 0), "0.6": (0.01, 0.09), "0.4": (-0.04, 0.02), "0.3": (-0.2, -0.1)}
    row = truth_row({"1": 0.0, "0.6": 0.05, "0.4": -0.01, "0.3": -0.15}, spread)
    assert peak(row) == "0.6" and bend(row) == 0.3 and wins(row) == ["0.6"]
    assert sentences([row]) == [
        "sweep label (drop): at most +5.0 points [+1.0, +9.0] over the unpruned tower, at keep 0.6 (an oracle); "
        "clearly below it from keep 0.3; beats checkerboard at keep 0.6"
    ]
    flat = truth_row({"1": 0.0, "0.6": 0.0}, {"1": (0, 0), "0.6": (-0.01, 0.01)})
    assert peak(flat) == "1" and bend(flat) is None and wins(flat) == []


def test_truth_needs_classes(truth: SearchTruthConfig, tmp_path: Path, pictures: Path) -> None:  # noqa: F811
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes((pictures / "cat" / "a.png").read_bytes())
    with pytest.raises(UserError, match="no class labels"):
        search_truth.main(replace(truth, data_root=tmp_path / "flat"))


@pytest.mark.parametrize(
    "changes, word",
    [(dict(criteria=("luck",)), "--criterion luck"), (dict(criteria=()), "names none"), (dict(rest=()), "--rest")],
)
def test_truth_refuses_values_outside_their_rule(truth, changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        search_truth.main(replace(truth, **changes))


# --- the command


def test_commands_are_listed_and_unknown_ones_refused(capsys) -> None:
    eval_main([])
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)
    with pytest.raises(SystemExit) as left:
        eval_main(["search-costs"])
    assert left.value.code == 2
    assert f"search-costs: unknown command; choose one of {', '.join(COMMANDS)}" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_parses_its_flags(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        eval_main([name, "--help"])
    assert left.value.code == 0 and "--out" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        eval_main([name, "--no-such-flag", "1"])
    assert left.value.code == 2


def test_user_mistakes_end_in_one_line(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        eval_main(["search-cost", "--strategies", "astar"])
    assert left.value.code == 2 and capsys.readouterr().err.startswith("error: --strategies astar: unknown")
