"""Tables of the papers: complete, sourced, and every known slip of theirs is found from the printed cells."""

import json

import pytest

from eval import reported_tables
from eval.reported_checks import compute_points, findings, headline_losses, recomputed_mean, slips
from eval.reported_tables import FOLDER, ReportedConfig, load_table, main, table_names
from patchrank.errors import UserError

SEVEN = ("caltech101", "pets", "flowers102", "food101", "aircraft", "dtd", "ucf101")


@pytest.mark.parametrize("name", table_names())
def test_every_table_says_where_it_is_from(name):
    table = load_table(name)
    assert table.title and table.source and table.model and table.unit and table.rows
    assert len({row.name for row in table.rows}) == len(table.rows) or name == "crossget_coop"
    for column, parts in table.means.items():
        assert column not in parts
        assert all({column, *parts} <= set(row.values) for row in table.rows)


def test_a_cell_of_each_paper():
    assert load_table("patch_ranking_1").row("ucf101 preservation").values["predicted 50"] == 60.9
    assert load_table("patch_ranking_4").row("ToMe").values["aircraft"] == 20.4
    assert load_table("aclip_main").row("A-CLIP-eff, 25 epochs").values["coco t2i"] == 22.5
    assert load_table("aclip_26").row("A-CLIP").values["stl10"] == 95.4
    assert load_table("pgs_retrieval").row("CLIP-PGS-0.3").values["flickr30k image@1"] == 47.1
    assert load_table("pgs_composition").row("FLIP").values["swap_att"] == 61.6


def test_averages_that_their_own_cells_do_not_give():
    found = {
        (one.table, one.row, one.column): (one.printed, round(one.recomputed, 1), one.beyond_rounding)
        for name in table_names()
        for one in slips(load_table(name))
    }
    assert found == {
        ("patch_ranking_4", "EViT", "avg"): (64.3, 64.4, False),
        ("patch_ranking_7", "layers 1, 3, 5, 7", "avg"): (78.9, 78.8, True),
        ("patch_ranking_7", "layers 4, 6, 8, 10", "avg"): (79.2, 79.4, True),
        ("pgs_composition", "CLIP", "avg obj"): (73.7, 73.9, True),
        ("pgs_composition", "A-CLIP", "avg obj"): (71.6, 70.2, True),
        ("pgs_composition", "A-CLIP", "avg att"): (68.4, 68.5, False),
        ("pgs_composition", "E-CLIP", "avg att"): (68.4, 67.9, True),
        ("pgs_robustness", "CLIP", "OOD avg"): (29.0, 29.9, True),
        ("pgs_robustness", "A-CLIP", "OOD avg"): (30.3, 29.3, True),
    }


def test_the_compute_at_keep_60_is_that_of_keep_50():
    points = compute_points()
    assert points["dense"] == pytest.approx(23.4)
    printed = {row.values["keep"]: row.values["GFLOPs"] for row in load_table("compute_points").rows[:5]}
    for keep, value in printed.items():
        assert points[f"one cut, keep {round(100 * keep)}"] == pytest.approx(value, abs=0.05)
    said = load_table("patch_ranking_4").row("Patch Ranking").values["GFLOPs"]
    assert said == load_table("patch_ranking_3").row("pruned, keep 60").values["GFLOPs"] == printed[0.5]
    assert points["one cut, keep 60"] == pytest.approx(18.09, abs=0.01)
    assert points["4 x 20 tokens"] == pytest.approx(19.76, abs=0.01)


def test_means_of_table_1():
    rows = load_table("patch_ranking_1").rows
    expected = {
        "label": (77.3, 77.8, 77.9, 76.8, 65.6, 64.1, 62.5, 60.1),
        "confidence": (67.3, 66.9, 66.8, 65.8, 65.5, 63.9, 62.0, 59.5),
        "preservation": (67.7, 67.5, 67.0, 65.0, 67.4, 66.8, 66.3, 62.9),
    }
    for score, means in expected.items():
        of = [row for row in rows if row.labels["score"] == score]
        assert [row.labels["dataset"] for row in of] == list(SEVEN)
        columns = [f"{kind} {keep}" for kind in ("golden", "predicted") for keep in (80, 70, 60, 50)]
        found = [sum(row.values[column] for row in of) / 7 for column in columns]
        assert found == pytest.approx(means, abs=0.0501)


def test_a_predictor_learns_little_of_its_data_set():
    rows = load_table("patch_ranking_2").rows
    inside = [row.values[row.name] for row in rows]
    outside = [value for row in rows for name, value in row.values.items() if name != row.name]
    assert sum(inside) / 7 == pytest.approx(64.94, abs=0.01)
    assert sum(outside) / 42 == pytest.approx(64.72, abs=0.01)


def test_other_findings():
    assert headline_losses() == {"untuned": 1.6, "text prompts": 1.7, "text and visual prompts": 0.3}
    texts = {(one.kind, one.table): one.text for one in findings()}
    assert {("same numbers", "patch_ranking_4"), ("same numbers", "patch_ranking_5")} <= set(texts)
    assert "-1.2 to +1.2" in texts["two values", "patch_ranking_7"]
    assert "label 57.2, confidence 57.7, preservation 77.3 %; chance is 51.0 %" in texts["reading", "patch_ranking_1"]
    assert "2.30x faster is against SLIP" in texts["reading", "aclip_main"]
    table = load_table("aclip_26")
    without = table.means["avg"][:-1]
    assert [round(recomputed_mean(row, without), 1) for row in table.rows] == [39.4, 34.1]


def test_a_wrong_cell_would_be_found(tmp_path, monkeypatch):
    values = json.loads((FOLDER / "patch_ranking_5.json").read_text())
    values["rows"][0]["values"]["pets"] += 2
    (tmp_path / "changed.json").write_text(json.dumps(values))
    monkeypatch.setattr(reported_tables, "FOLDER", tmp_path)
    (slip,) = slips(load_table("changed"))
    assert slip.row == "dense" and slip.beyond_rounding


def test_the_command_prints_tables_and_findings(tmp_path, capsys):
    main(ReportedConfig(table=("patch_ranking_4",), out=tmp_path))
    printed = capsys.readouterr().out
    assert "A-ViT" in printed and "16.8 GFLOPs at keep 60 % is the point of one cut, keep 50" in printed
    assert json.loads((tmp_path / "findings.json").read_text())[0]["kind"] == "average"
    with pytest.raises(UserError, match=r"--table nothing: unknown; choose from aclip_26"):
        main(ReportedConfig(table=("nothing",), out=tmp_path))
