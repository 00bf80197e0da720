"""predictors/schedule*.py: stage costs, families at a budget, the dynamic programme, the command."""

import csv
import itertools
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

from patchrank.checkpoints.saved import save_clip
from patchrank.errors import UserError
from patchrank.loading import load_clip
from patchrank.macs import pruned_macs
from patchrank.preprocess import Preprocess
from patchrank.presets import spec_for_macs
from patchrank.salient import salient_cost, salient_preset
from patchrank.scorers import SCORERS
from patchrank.spec import PruneSpec
from patchrank.text import TextConfig, TextTower
from patchrank.tower import TowerConfig
from predictors import schedule_search as families
from predictors.schedule import SEARCHED, find, main, selection
from predictors.schedule_config import ScheduleConfig, check
from predictors.schedule_costs import MacCosts, total
from predictors.schedule_refit import finalists
from predictors.schedule_report import DENSE, Row, advice
from predictors.schedule_times import TimeCosts, measure, milliseconds
from predictors.schedules import at_keep, at_power, within

HALF = (0.5, 0.5, 0.5)
VIT_TI = TowerConfig(image_size=(224, 224), patch_size=16, width=192, num_layers=12, num_heads=3, mlp_width=768)
MANNER = PruneSpec(cuts=(), select="suppress")
CONFIG = make_tower(num_layers=5).config


def mac_cost(manner: PruneSpec = MANNER):
    return lambda config, spec: total(MacCosts(config, manner), config, spec)


# Costs


@pytest.mark.parametrize("changes", [dict(), dict(num_prefix=0, pool="mean"), dict(num_prefix=3, pool="attention")])
@pytest.mark.parametrize("rest", ["fold", "drop"])
@pytest.mark.parametrize("select", ["suppress", "topk", "cover"])
def test_stages_add_up_to_the_macs_of_the_tower(changes: dict, rest: str, select: str) -> None:
    config = TowerConfig(**(vars(CONFIG) | changes))
    manner = PruneSpec(cuts=(), rest=rest, select=select)
    cost = salient_cost(pruned_macs) if select == "cover" else pruned_macs
    for where, cuts in itertools.product(("before", "inside"), ((), ((1, 0.6),), ((0, 0.9), (2, 0.5), (4, 0.3)))):
        spec = replace(manner, cuts=cuts, where=where)
        assert total(MacCosts(config, manner), config, spec) == cost(config, spec)


def times_of(**columns) -> TimeCosts:
    """A table for 16 patches in which every stage takes a made-up time."""
    plain = dict(key=(1.0, 2.0), plain=(10.0, 20.0), biased=(11.0, 22.0), feed=(5.0, 10.0), row=(2.0, 3.0))
    cuts = dict(cut_high=(1.0, 2.0), cut_low=(2.0, 4.0))
    return TimeCosts(batch_size=2, num_prefix=1, patches=(8, 16), embed=7.0, pool=0.5, **(plain | cuts | columns))


def test_times_lie_on_lines_between_what_was_measured() -> None:
    times = times_of()
    assert times.attend(17, False) == 20 and times.attend(13, False) == 15 and times.attend(13, True) == 16.5
    assert times.cut(16, 8) == 4 and times.cut(16, 14.4) == pytest.approx(2) and times.cut(8, 5.6) == pytest.approx(1.5)
    dense = total(times, CONFIG, PruneSpec(cuts=()))
    assert dense == 7 + 4 * (20 + 10) + 3 + 0.5
    inside = total(times, CONFIG, PruneSpec(cuts=((1, 0.5),), where="inside", select="suppress"))
    assert inside == 7 + 30 + (20 + 4 + 5) + 2 * (11 + 5) + 2 + 0.5
    for select, keys in (("suppress", 2), ("cover", 2 * 2), ("topk", 2)):
        before = total(times, CONFIG, PruneSpec(cuts=((1, 0.5),), select=select))
        assert before == 7 + 30 + keys + 4 + 3 * (11 + 5) + 2 + 0.5


@pytest.mark.parametrize("num_prefix", [0, 1])
def test_measured_stages_are_positive_and_the_tower_is_their_sum(num_prefix: int) -> None:
    tower = make_tower(width=64, mlp_width=256, num_prefix=num_prefix, pool="class" if num_prefix else "mean")
    times = measure(tower, *selection(tower.config, "fold"), batch_size=4, rounds=2)
    assert times.patches[-1] == 16 and times.patches == tuple(sorted(set(times.patches)))
    columns = [times.key, times.plain, times.biased, times.feed, times.row, times.cut_high, times.cut_low]
    assert all(value > 0 for column in columns for value in column) and times.embed > 0
    assert json.loads(json.dumps(times.to_dict()))["batch_size"] == 4


def test_the_fastest_of_several_calls_counts_and_all_are_called_in_turns() -> None:
    order = []
    found = milliseconds({name: lambda name=name: order.append(name) for name in "ab"}, 3, torch.device("cpu"))
    assert order == ["a", "b"] * 5 and all(0 <= value < 100 for value in found.values())


# Specs at other counts


@settings(max_examples=25)
@given(
    keeps=st.lists(st.floats(0.2, 0.99), min_size=1, max_size=4),
    macs=st.floats(0.5, 1.0),
)
def test_within_meets_the_budget_and_no_more_would_fit(keeps: list[float], macs: float) -> None:
    spec = replace(MANNER, cuts=tuple((i, keep) for i, keep in enumerate(sorted(keeps, reverse=True))), where="inside")
    cost, dense = mac_cost(), mac_cost()(VIT_TI, PruneSpec(cuts=()))
    found = within(spec, macs, VIT_TI, cost)
    assert cost(VIT_TI, found) <= macs * dense
    assert [layer for layer, _ in found.cuts] == [layer for layer, _ in spec.cuts]
    richer = at_keep(found, min(196, round(found.cuts[-1][1] * 196) + 12), 196)
    assert cost(VIT_TI, richer) > macs * dense or macs > 0.9
    assert at_power(spec, 1.0, 196).counts(196) == spec.counts(196)


@pytest.mark.parametrize("macs", [0.0, 1.5, float("nan"), 0.01])
def test_budgets_out_of_reach_are_refused(macs: float) -> None:
    with pytest.raises(UserError, match=f"--macs {macs:g}:"):
        within(replace(MANNER, cuts=((2, 0.5),)), macs, VIT_TI, mac_cost())


# Families


def test_families_meet_the_budget_and_hold_the_presets() -> None:
    cost, dense = mac_cost(), mac_cost()(VIT_TI, PruneSpec(cuts=()))
    cuts = families.one_cuts(VIT_TI, 0.7, MANNER, cost)
    spans = families.spans(VIT_TI, 0.7, MANNER, cost)
    assert "one cut at 3" in cuts and "one cut at 0" not in cuts and "equal ratios in 9-10" not in spans
    assert 45 < len(spans) < 11 * 10 // 2, "all spans but those too late to save that much"
    for spec in (cuts | spans).values():
        assert 0.98 * 0.7 * dense <= cost(VIT_TI, spec) <= 0.7 * dense
    preset = spec_for_macs(VIT_TI, 0.7).counts(196)
    found = spans["equal ratios in 2-9"].counts(196)
    assert [layer for layer, _ in found] == [layer for layer, _ in preset]
    assert all(abs(K - other) <= 1 for (_, K), (_, other) in zip(found, preset))
    assert "one cut at 9" not in families.one_cuts(VIT_TI, 0.45, MANNER, cost), "too late to save that much"


def test_damage_between_measured_ratios_is_on_a_line_and_never_falls() -> None:
    table = families.DamageTable((0,), (0.8, 0.4), ((0.1, 0.05),))
    assert table.at(0, 1.0) == 0 and table.at(0, 0.9) == pytest.approx(0.05) and table.at(0, 0.8) == pytest.approx(0.1)
    assert table.at(0, 0.5) == pytest.approx(0.1), "a luckier smaller keep counts as no better"


@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), price=st.floats(1e-9, 1e-4))
def test_the_programme_finds_the_least_of_all_schedules(seed: int, price: float) -> None:
    config = make_tower(image_size=(24, 16), num_layers=4).config
    rng, costs = np.random.default_rng(seed), MacCosts(config, MANNER)
    damage = np.cumsum(rng.random((3, 3)) * 0.1, axis=1)
    table = families.DamageTable((0, 1, 2), (0.7, 0.4, 0.15), tuple(map(tuple, damage.tolist())))

    def value(counts: tuple[int, ...]) -> float:
        before, found = 6, 0.0
        for place, K in enumerate(counts):
            harm = table.at(place, K / 6) - table.at(place, before / 6)
            found += max(0.0, harm) + price * (costs.attend(1 + before, False) + costs.mlp(1 + K))
            found += price * costs.cut(before, K) if K < before else 0.0
            before = K
        return found + price * costs.last(1 + before, False)

    spec = families.programme(config, MANNER, table, costs, price)
    at, counts, left = dict(spec.counts(6)), [], 6
    for layer in range(3):
        left = at.get(layer, left)
        counts.append(left)
    falling = [c for c in itertools.product(range(6, 0, -1), repeat=3) if list(c) == sorted(c, reverse=True)]
    assert value(tuple(counts)) == pytest.approx(min(map(value, falling)), rel=1e-9)


def test_programmes_meet_the_budget_and_cut_where_it_hurts_least() -> None:
    layers = tuple(families.inner(VIT_TI))
    harmless_late = tuple(
        tuple(0.2 * (1 - keep) ** 2 / (1 + layer) for keep in families.TABLE_KEEPS) for layer in layers
    )
    table = families.DamageTable(layers, families.TABLE_KEEPS, harmless_late)
    costs, cost = MacCosts(VIT_TI, MANNER), mac_cost()
    found = families.programmes(VIT_TI, 0.56, MANNER, table, costs, cost)
    dense = cost(VIT_TI, PruneSpec(cuts=()))
    assert found and all(0.54 * dense <= cost(VIT_TI, spec) <= 0.56 * dense for spec in found.values())
    assert all(1 < len(spec.cuts) <= 11 for spec in found.values())


def test_moves_are_valid_and_never_make_it_worse() -> None:
    tower = make_tower(num_layers=6)
    image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = families.Tokens(["a"] * 4, tower.embed(image), tower(image), torch.full((4,), -1))
        judge = families.cosine_judge(tower, tokens, SCORERS["random"](tower.config.grid))
        start = families.spans(tower.config, 0.7, MANNER, mac_cost())["equal ratios in 1-3"]
        best, again = (
            families.improve(start, 0.7, tower.config, mac_cost(), judge, num_moves=12, seed=3) for _ in range(2)
        )
        assert judge(best) >= judge(start) and best == again
    assert pruned_macs(tower.config, best) <= 0.7 * pruned_macs(tower.config, PruneSpec(cuts=()))
    generator, spec = torch.Generator().manual_seed(0), start
    for _ in range(60):
        spec = families.moved(spec, tower.config, generator)
        assert 1 <= len(spec.cuts) <= 5 and all(layer < 5 for layer, _ in spec.cuts)


# The command


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ScheduleConfig:
    """Flags for a CLIP of 16 patches and 5 blocks and a flat folder of pictures."""
    folder, rng = tmp_path_factory.mktemp("schedule"), np.random.default_rng(0)
    torch.manual_seed(0)
    text = TextTower(TextConfig(width=16, num_layers=1, num_heads=2, mlp_width=16, output_dim=24))
    preprocess = Preprocess(image_size=(32, 32), resize=32, mean=HALF, std=HALF)
    save_clip(folder / "tiny", make_tower(num_layers=5), text, preprocess, 20.0, name="tiny", dtype=torch.float32)
    (folder / "pictures").mkdir()
    for number in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / "pictures" / f"{number:02d}.png")
    data = dict(data="folder", data_root=folder / "pictures", split="all", num_images=4, held_out=6)
    small = dict(num_moves=4, batch_size=2, rounds=2, threads=1, out=folder / "out")
    return ScheduleConfig(model=str(folder / "tiny"), **data, **small)


def test_a_run_leaves_the_schedule_and_its_table(config: ScheduleConfig, capsys) -> None:
    main(config)
    report = json.loads((config.out / "schedule.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert next(iter(rows)) == DENSE and list(rows)[-1] == SEARCHED and "preset accurate" in rows
    assert rows[DENSE]["cosine_held_out"] == 1 and rows[DENSE]["macs_share"] == 1
    spec = PruneSpec.from_dict(report["spec"])
    assert rows[SEARCHED]["cuts"] == ",".join(f"{layer}:{K}" for layer, K in spec.counts(16))
    as_applied = salient_preset(spec_for_macs, make_tower(num_layers=5).config, 0.7).counts(16)
    assert rows["preset accurate"]["cuts"] == ",".join(f"{layer}:{K}" for layer, K in as_applied)
    assert spec.select == "cover"
    assert all(row["macs_share"] <= 0.7 and row["ms_measured"] > 0 for name, row in rows.items() if name != DENSE)
    family = [
        row["cosine_deciding"] for name, row in rows.items() if name not in (DENSE, SEARCHED) and "preset" not in name
    ]
    assert rows[SEARCHED]["cosine_deciding"] >= max(family) - 1e-6
    table = list(csv.DictReader((config.out / "schedule.csv").open()))
    assert [row["name"] for row in table] == list(rows)
    printed = capsys.readouterr().out
    assert all(row["cosine_refitted"] is None for row in rows.values()) and "calibrated" not in printed
    assert "| dense |" in printed and report["advice"] in (config.out / "schedule.md").read_text()


def values_of(**cosines: float) -> dict[str, tuple[float, PruneSpec]]:
    """{name: (cosine, spec)}; a name ends with its first block."""
    return {name: (value, replace(MANNER, cuts=((int(name[-1]), 0.5),))) for name, value in cosines.items()}


def test_finalists_begin_in_different_blocks() -> None:
    values = values_of(a1=0.7, b1=0.8, a2=0.9, a3=0.5, b3=0.6)
    assert list(finalists(values, 2)) == ["b1", "a2"] and list(finalists(values, 9)) == ["b1", "a2", "b3"]
    assert finalists(values, 1)["a2"] == values["a2"][1]


def test_a_short_calibration_decides_where_it_is_asked_for(config: ScheduleConfig, tmp_path: Path) -> None:
    clip = load_clip(config.model)
    again = replace(config, data_root=tmp_path / "pictures", out=tmp_path / "out", num_images=12, held_out=4,
                    refit=20, refit_images=24, finalists=3, batch_size=8)  # fmt: skip
    again.data_root.mkdir()
    rng = np.random.default_rng(1)
    for number in range(40):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(again.data_root / f"{number:02d}.png")
    report = find(again, clip)
    rows = {row["name"]: row for row in report["rows"]}
    tried = {name: row for name, row in rows.items() if row["cosine_refitted"] is not None and name != SEARCHED}
    assert len(tried) == 3 and len({row["cuts"].split(":")[0] for row in tried.values()}) == 3
    assert sum(row["cosine_refitted"] > row["cosine_held_out"] for row in tried.values()) >= 2
    (same,) = {row["cuts"] for row in tried.values() if row["cosine_refitted"] == rows[SEARCHED]["cosine_refitted"]}
    assert rows[SEARCHED]["cuts"] == same and "| calibrated |" in report["table"]
    logs = {folder.name for folder in (again.out / "refit").iterdir()}
    assert {name.rpartition("-")[0] for name in logs} == {name.replace(" ", "-") for name in tried}
    assert find(again, clip)["spec"] == report["spec"]
    assert {folder.name for folder in (again.out / "refit").iterdir()} == logs, "states are read, none is trained again"
    find(replace(again, macs=0.6), clip)
    find(replace(again, refit=10), clip)
    assert {folder.name for folder in (again.out / "refit").iterdir()} > logs, "other runs in one --out do not clash"


def test_milliseconds_are_a_budget_too(config: ScheduleConfig, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("predictors.schedule.measure", lambda *args, **options: times_of())
    clip = load_clip(config.model)
    dense = 130.5 / 2  # of the made-up table, by image
    report = find(replace(config, batch_size=2, ms=0.8 * dense, out=tmp_path), clip)
    assert report["share"] == pytest.approx(0.8)
    assert all(row["ms_predicted"] <= 0.8 * dense + 1e-9 for row in report["rows"][1:])
    with pytest.raises(UserError, match=r"the dense tower takes 65.* ms an image here; nothing to prune"):
        find(replace(config, ms=70.0, out=tmp_path), clip)


def test_advice_says_when_pruning_does_not_pay(config: ScheduleConfig) -> None:
    shared = dict(macs_share=0.7, ms_predicted=1.0, cosine_deciding=1.0, cosine_held_out=1.0, cosine_refitted=None)
    dense = Row(name=DENSE, cuts="", where="", ms_measured=2.0, **shared)
    slow = Row(name=SEARCHED, cuts="1:8", where="inside", ms_measured=2.5, **shared)
    assert "saves no time here" in advice([dense, slow])
    assert advice([dense, replace(slow, ms_measured=1.0)]).startswith("2.00 times as fast as dense: 1:8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data="nothing"), "--data nothing: unknown"),
        (dict(rest="merge"), "--rest merge: unknown; choose one of fold, drop"),
        (dict(macs=0.7, ms=3.0), "--macs 0.7 --ms 3: exactly one"),
        (dict(macs=1.2), "--macs 1.2: must lie in"),
        (dict(ms=-1.0), "--ms -1: must be positive"),
        (dict(num_images=0), "--num-images 0: must be 1 or more"),
        (dict(num_moves=-1), "--num-moves -1: must be 0 or more"),
        (dict(refit=-1), "--refit -1: must be 0 or more"),
        (dict(finalists=0), "--finalists 0: must be 1 or more"),
    ],
)
def test_bad_flags_are_one_line(config: ScheduleConfig, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(replace(config, **changes))


@pytest.mark.system
def test_the_embedded_default_without_flags(tmp_path: Path) -> None:
    report = find(ScheduleConfig(out=tmp_path), load_clip())
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["preset accurate"]["macs_share"] == pytest.approx(0.7, rel=0.01)
    assert all(row["cosine_held_out"] > 0.98 for row in rows.values())
