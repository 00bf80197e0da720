"""Tables of the papers: complete, sourced, and every known slip of theirs is found from the printed cells."""

import json

import pytest

from eval import reported_tables
from eval.reported_checks import compute_points, findings, headline_losses, recomputed_mean, slips
from eval.reported_compute import image_gmacs
from eval.reported_tables import FOLDER, SEVEN, ReportedConfig, load_table, main, table_names
from export.bench_graphs import SHAPES
from patchrank.errors import UserError
from patchrank.macs import dense_macs


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
    assert load_table("patch_ranking_6").row("ucf101 transformer block").values["match@100"] == 51.2
    assert load_table("patch_ranking_figure_5").row("dtd class attention").values["keep 60"] == 43.1
    assert load_table("maskclip").row("MaskCLIP").values["coco t2i"] == 25.5
    assert load_table("slip").row("SLIP ViT-L, 100 epochs").values["imagenet"] == 47.9


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


def test_table_6_and_figure_5_hold_rows_of_other_tables():
    table_1 = {row.labels["dataset"]: row.values for row in load_table("patch_ranking_1").rows if "pres" in row.name}
    for name in SEVEN:
        mixer = load_table("patch_ranking_6").row(f"{name} Mix-MLP").values
        assert all(mixer[f"keep {keep}"] == table_1[name][f"predicted {keep}"] for keep in (80, 70, 60, 50))
        assert mixer["match@100"] == table_1[name]["match@100"]
        for method in ("class attention", "predicted"):
            assert (
                load_table("patch_ranking_figure_5").row(f"{name} {method}").values["keep 100"]
                == table_1[name]["dense"]
            )


KNOWN = {
    ("compute", "patch_ranking_3"): ["time falls 2.19x where compute falls 1.39x", "20.7% of the image tower, 15.6%"],
    ("compute", "patch_ranking_5"): [
        "18.9 GFLOPs at keep 60 % is figure 1's point of keep 50; keep 60 is 20.5",
        "20.9 GFLOPs at keep 60 % is figure 1's point of keep 50; keep 60 is 22.2",
        "charged 0.7 GFLOPs; in 12 blocks they cost 1.48",
        "text prompts are charged 3.5",
        "untuned 6.6, text prompts 8, text and visual prompts 6.7",
    ],
    ("compute", "aclip_main"): [
        "A-CLIP: printed time 1.16 of CLIP's, its multiply-accumulates are 1.30",
        "0.86 of",
        "1.08",
    ],
    ("compute", "pgs_zero_shot"): [
        "CLIP-PGS-0.5: printed time 0.5 of CLIP's, 98 patches and the text cost 0.57",
        "0.74",
    ],
    ("same numbers", "patch_ranking_4"): ["Patch Ranking (cuts at four layers) is digit by digit"],
    ("same numbers", "patch_ranking_5"): ["pruned (cuts at four layers) is digit by digit"],
    ("two values", "patch_ranking_7"): ["-1.2 to +1.2"],
    ("two values", "patch_ranking_2"): ["62.9 / 64.9 / 64.0", "on 6 of 7 sets"],
    ("two values", "compute_points"): ["captioned Caltech101 (93.5), starts at 70.5: those of flowers102"],
    ("two values", "aclip_suite"): ["48.1 here, 48 in the main table"],
    ("reading", "patch_ranking_1"): [
        "label 57.2, confidence 57.7, preservation 77.3 %; chance is 51.0 %",
        "in 6 of 28 cells",
    ],
    ("reading", "patch_ranking_2"): ["trained on the tested set 64.94, on another 64.72"],
    ("reading", "patch_ranking_4"): ["aircraft (EViT 23.3 against 22.9)", "65.4 and 66.3 are the same row"],
    ("reading", "patch_ranking_5"): [
        "untuned 1.6, text prompts 1.7, text and visual prompts 0.3",
        "food101 84.9 after 86",
    ],
    ("reading", "patch_ranking_6"): [
        "dtd (77.5 of MLP against 72.3)",
        "without ucf101: MLP 66.4, transformer block 66.5",
    ],
    ("reading", "aclip_main"): ["2.30x faster is against SLIP"],
    ("reading", "aclip_26"): ["counts ImageNet"],
    ("reading", "maskclip"): ["44.5, not the 42.7", "5 of 5"],
    ("reading", "slip"): ["CLIP ViT-L, 25 epochs; SLIP ViT-L, 25 epochs"],
    ("reading", "pgs_robustness"): ["35.2 against 36.1"],
}
"""(kind, table) -> what its findings say."""


def test_every_known_finding_is_computed():
    assert headline_losses() == {"untuned": 1.6, "text prompts": 1.7, "text and visual prompts": 0.3}
    found = findings()
    assert {(one.kind, one.table) for one in found if one.kind != "average"} == KNOWN.keys()
    for place, parts in KNOWN.items():
        texts = "\n".join(one.text for one in found if (one.kind, one.table) == place)
        assert all(part in texts for part in parts), (place, texts)
    assert image_gmacs(196) == pytest.approx((dense_macs(SHAPES["ViT-B-16"], class_row_only=False) - 768 * 512) / 1e9)
    table = load_table("aclip_26")
    without = table.means["avg"][:-1]
    assert [round(recomputed_mean(row, without), 1) for row in table.rows] == [39.4, 34.1]


@pytest.mark.parametrize(
    ("table", "row", "column", "value", "gone"),
    [
        ("patch_ranking_2", "pets", "pets", 83.7, "trained on the tested set 64.94"),
        ("patch_ranking_4", "EViT", "aircraft", 22.0, "a rival is better"),
        ("patch_ranking_5", "text and visual prompts, dense", "food101", 88.0, "makes it worse"),
        ("patch_ranking_5", "text and visual prompts, dense", "GFLOPs", 28.4, "are charged 0.7"),
        ("aclip_main", "A-CLIP-eff, 25 epochs", "time", 1.1, "A-CLIP-eff: printed time"),
        ("pgs_zero_shot", "CLIP-PGS-0.3", "time", 0.7, "CLIP-PGS-0.3: printed time"),
        ("aclip_suite", "A-CLIP, 100 epochs", "imagenet", 48.0, "in the main table"),
        ("compute_points", "figure 1, dense", "top-1", 93.5, "captioned Caltech101"),
    ],
)
def test_a_finding_goes_where_the_cell_is_mended(table, row, column, value, gone, tmp_path, monkeypatch):
    assert any(gone in one.text for one in findings())
    for path in FOLDER.glob("*.json"):
        values = json.loads(path.read_text())
        if path.stem == table:
            next(one for one in values["rows"] if one["name"] == row)["values"][column] = value
        (tmp_path / path.name).write_text(json.dumps(values))
    monkeypatch.setattr(reported_tables, "FOLDER", tmp_path)
    load_table.cache_clear()
    try:
        assert not any(gone in one.text for one in findings())
    finally:
        load_table.cache_clear()


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
