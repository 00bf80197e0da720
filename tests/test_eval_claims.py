"""`python -m eval claims` on made-up result files: every verdict follows from the numbers, by the claim's rule."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_eval_report import hits, write

from eval import claims, claims_patch_ranking
from eval.claims import ClaimsConfig, all_claims, main
from eval.claims_found import self_named
from eval.claims_print import compact, table
from eval.claims_rules import AT_MOST, FAILS, GAIN, HOLDS, NOT_TESTABLE, TIME, VERDICTS, Found
from eval.records import DENSE, read_records, read_sides, write_record
from eval.truth_rows import TruthRow
from patchrank.errors import UserError
from predictors.prompt_table import PromptRow

ROW = {"paper", "claim", "reported", "ours", "interval", "verdict", "why", "command"}
ORIGIN = {"command": "python -m made up", "versions": {}}


def judged(folder: Path) -> dict[str, dict]:
    """Rows by claim."""
    main(ClaimsConfig(results=folder, out=folder / "out"))
    rows = json.loads((folder / "out" / "claims.json").read_text())["rows"]
    assert len({row["claim"] for row in rows}) == len(rows) == len(all_claims())
    return {row["claim"]: row for row in rows}


def put(folder: Path, name: str, rows: list[dict], **more) -> None:
    (folder / name).write_text(json.dumps(ORIGIN | {"rows": rows} | more))


@pytest.mark.parametrize(
    "rule, low, high, reported, verdict",
    [(GAIN, 0.1, 2.0, None, HOLDS), (GAIN, -2.0, -0.1, None, FAILS), (GAIN, -1.0, 1.0, 4.0, NOT_TESTABLE),
     (AT_MOST, 0.5, 1.6, 1.6, HOLDS), (AT_MOST, 1.7, 2.0, 1.6, FAILS), (AT_MOST, 1.0, 2.0, 1.6, NOT_TESTABLE),
     (TIME, 1.1, 1.2, 1.16, HOLDS), (TIME, 1.22, 1.3, 1.16, FAILS), (TIME, 1.2, 1.3, 1.16, NOT_TESTABLE)],
)  # fmt: skip
def test_rules(rule, low, high, reported, verdict):
    found = Found(value=(low + high) / 2, low=low, high=high, setting="", command="")
    assert rule.judge(found, reported) == verdict
    exact = Found(value=1.0, setting="", command="")
    assert GAIN.judge(exact, None) == HOLDS


def test_without_files_only_the_arithmetic_is_judged(tmp_path, capsys):
    rows = judged(tmp_path)
    said = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert said.keys() == {"command", "versions", "rows"} and said["versions"]["patchrank"]
    assert {row["paper"] for row in rows.values()} == {"Patch Ranking", "A-CLIP", "CLIP-PGS"}
    measured = {claim: row for claim, row in rows.items() if row["ours"] is not None}
    assert measured.keys() == {"4 x 20 tokens (40 %) cost what is printed"}
    row = measured["4 x 20 tokens (40 %) cost what is printed"]
    assert (row["reported"], row["verdict"], row["interval"]) == (16.8, FAILS, None)
    assert row["ours"] == pytest.approx(13.92 + 5.84, abs=0.02)
    for row in rows.values():
        assert row.keys() >= ROW and row["verdict"] in VERDICTS
        if row["ours"] is None:
            assert row["why"] == f"not measured: {row['command']}" and row["command"].startswith("python -m ")
    assert "1 fails, 40 not testable" in capsys.readouterr().out


def test_reported_numbers_are_the_papers():
    reported = {one.claim: one.reported for one in all_claims()}
    assert reported["40 % of the patches cost this little, prompts tuned"] == 0.3
    assert reported["40 % of the patches cost this little, untuned, the rest dropped"] == 1.6
    assert reported["golden keep sets by label (an oracle) beat the unpruned model, keep 60 %"] == 10.1
    assert reported["a predictor trained on golden rankings finds their top 100 (corrected for chance)"] == 0.54
    assert reported["attentive masking beats random masking, 1 view"] == 4.5
    assert reported["A-CLIP beats CLIP"] == 6.3 and reported["CLIP-PGS-0.3 beats CLIP"] == 4.4
    assert reported["A-CLIP-eff trains in this time of plain CLIP"] == 0.86
    assert reported["it is faster by as much as is printed, batch 16"] == 2.19
    assert claims_patch_ranking.corrected(100.0) == 1.0
    assert claims_patch_ranking.corrected(100 * 100 / 196) == pytest.approx(0.0)


def cost_row(strategy: str, auc: float, **more) -> dict:
    return {"strategy": strategy, "rest": "drop", "num_images": 9, "auc": auc, "auc_interval": [auc - 0.01, auc + 0.01],
            "best_free": "checkerboard"} | more  # fmt: skip


def truth_row(criterion: str, gain: float) -> dict:
    at, pair = {"0.6": gain}, {"0.6": (gain - 0.01, gain + 0.01)}
    row = TruthRow(
        strategy="sweep", criterion=criterion, rest="drop", num_images=1000, dense_acc1=0.7, acc1_at_keep=at,
        acc1_interval_at_keep=pair, cosine_at_keep=at, minus_dense_at_keep=at, minus_dense_interval_at_keep=pair,
        minus_checkerboard_at_keep=at, minus_checkerboard_interval_at_keep=pair,
    )  # fmt: skip
    return asdict(row)


def test_search_speed_and_prompts(tmp_path):
    sweep = {"quality": 0.2, "quality_interval": [-0.1, 0.5]}
    put(tmp_path, "search_cost.json", [cost_row("greedy-1", 0.99), cost_row("sweep", 0.92, **sweep),
                                       cost_row("random", 0.91), cost_row("centre", 0.7)])  # fmt: skip
    put(tmp_path, "search_truth.json", [truth_row("label", 0.08), truth_row("preservation", -0.05)])
    bench = {"model": "ViT-B-16", "variant": "drop-1", "runtime": "onnxruntime-cpu", "precision": "float32",
             "keep": 0.6, "threads": 2, "ideal_speedup": 1.4}  # fmt: skip
    runs = [(16, 1.4, [1.3, 1.5]), (16, 1.5, [1.4, 1.6]), (1, 0.9, [0.8, 0.95])]
    put(tmp_path, "export_bench.json", [bench | {"batch": batch, "speedup": speed, "speedup_quartiles": ends}
                                        for batch, speed, ends in runs])  # fmt: skip
    prompts = [
        PromptRow(name=f"tuned pruned ({kind})", acc1=0.8, acc1_std=None, acc1_seeds=[0.8], image_macs=7,
                  macs_share=0.8, loss=loss, loss_ci95=(loss - 0.001, loss + 0.001))
        for kind, loss in (("text", 0.02), ("text + visual", 0.001))
    ]  # fmt: skip
    put(tmp_path, "prompt.json", [asdict(row) for row in prompts], settings={"data": "pets"}, num_images=100)
    shared = {"match_interval": [0.2, 0.4], "minus_mean_rank_interval": [0.1, 0.3]}
    found = [("trained: a", 0.3, True, True), ("trained: b", 0.5, True, False), ("mean-rank", 0.9, False, False)]
    matches = [
        shared
        | {"method": name, "trained": is_ours, "from_rankings": taught, "match": match, "minus_mean_rank": match - 0.3}
        for name, match, is_ours, taught in found
    ]
    settings = {"data": "toys", "strategy": "sweep"}
    put(tmp_path, "golden_match.json", matches, settings=settings, num_images=9)
    rows = judged(tmp_path)
    expected = {
        "a predictor trained on golden rankings finds their top 100 (corrected for chance)": (0.3, FAILS),
        "a trained scorer finds more of the golden top 100 than positions alone do": (0.2, HOLDS),
        "greedy search beats random and image centre": (0.08, HOLDS),
        "one sweep, as the text describes it, beats random and image centre": (0.01, NOT_TESTABLE),
        "one sweep finds the optimal (golden) order": (0.2, FAILS),
        "golden keep sets by label (an oracle) beat the unpruned model, keep 60 %": (8.0, HOLDS),
        "golden keep sets by feature preservation lose this little, keep 60 %": (5.0, FAILS),
        "without 40 % of the patches the encoder is faster, batch 16": (1.45, HOLDS),
        "without 40 % of the patches the encoder is faster, batch 1": (0.9, FAILS),
        "it is faster by as much as is printed, batch 16": (1.45, FAILS),
        "40 % of the patches cost this little, prompts tuned": (0.1, HOLDS),
        "visual (compensation) tokens take loss away beside text prompts": (1.9, HOLDS),
    }
    for claim, (ours, verdict) in expected.items():
        assert (rows[claim]["ours"], rows[claim]["verdict"]) == (pytest.approx(ours), verdict), claim
    fast = rows["without 40 % of the patches the encoder is faster, batch 16"]
    assert fast["interval"] == [1.3, 1.6] and fast["command"] == ORIGIN["command"]
    golden = rows["golden keep sets by feature preservation lose this little, keep 60 %"]
    assert golden["interval"] == pytest.approx([4.0, 6.0])


def test_records_are_compared_by_image(tmp_path):
    wrong = {"ours-trained-drop": 12, "tome": 4, "drop-class-attention": 30, "ours": 0, "a-vit": 12}
    for dataset in ("food101", "tiny-imagenet"):
        write(tmp_path / "eval", dataset, DENSE, 1.0, hits(0), 1.0)
        for method, count in wrong.items():
            write(tmp_path / "eval", dataset, method, 0.7, hits(count), 0.9)
    rows = judged(tmp_path)
    lost = rows["40 % of the patches cost this little, untuned, the rest dropped"]
    assert lost["ours"] == pytest.approx(30.0) and lost["verdict"] == FAILS and "80 images" in lost["why"]
    assert rows["the same saving costs this little, untrained, the rest folded (ours)"]["verdict"] == HOLDS
    assert rows["ahead of ToMe at equal compute"]["verdict"] == FAILS
    tie = rows["ahead of A-ViT at equal compute"]
    assert tie["ours"] == 0.0 and tie["verdict"] == NOT_TESTABLE and "reaches across 0" in tie["why"]
    moved = rows["the predictor works on data that it was not trained on"]
    assert moved["ours"] == pytest.approx(45.0) and moved["verdict"] == HOLDS and "Tiny-ImageNet, " not in moved["why"]
    assert rows["ahead of EViT at equal compute"]["ours"] is None  # no such record


def study_row(recipe: str, value: float, tier: int = 1, seed: int = 0) -> dict:
    metrics = {"a accuracy": value, "b t2i@5": value, "b t2i@1": 0}
    return {"recipe": recipe, "tier": tier, "seed": seed, "metrics": metrics, "num_test": {"a": 1000, "b": 1000}}


def test_pretraining(tmp_path):
    # a study without ablations says nothing of edges, but how to ask for them
    first = {"clip": 0.3, "aclip": 0.5, "att2x50": 0.31, "pgs-0.5": 0.2, "flip50": 0.3}
    rows = [study_row(recipe, value, seed=seed) for recipe, value in first.items() for seed in (0, 1)]
    rows += [study_row("clip", 0.3, tier=2), study_row("att2x50_high", 0.1, tier=2), study_row("att1x50", 0.5, tier=2)]
    put(tmp_path, "pretrain_study.json", rows, data="toys", minutes=[30, 10])
    times = {"clip": 1.0, "aclip": 1.3, "aclip_eff": 0.8, "slip": 2.6, "pgs-0.5": 0.55}
    ratios = [{"recipe": recipe, "macs_ratio": value, "time_ratio": value, "time_ratio_low": 0.98 * value,
               "time_ratio_high": 1.02 * value} for recipe, value in times.items()]  # fmt: skip
    put(tmp_path, "pretrain_cost.json", ratios, model="ViT-B/16", threads=2, batch_size=16)
    found = judged(tmp_path)
    edges = found["protecting edges helps"]
    assert edges["verdict"] == NOT_TESTABLE and edges["command"].endswith("--tiers 3")
    expected = {
        "A-CLIP beats CLIP": (20.0, HOLDS),
        "attentive masking, 2 views, beats no mask": (1.0, NOT_TESTABLE),
        "no mask beats dropping the most attended half": (20.0, HOLDS),
        "CLIP-PGS-0.5 beats random masking (FLIP)": (-10.0, FAILS),
        "attentive masking beats random masking, 1 view": (None, NOT_TESTABLE),
        "A-CLIP trains in this time of plain CLIP": (1.3, FAILS),
        "A-CLIP-eff trains in this time of plain CLIP": (0.8, HOLDS),
        "A-CLIP trains faster than SLIP": (2.0, HOLDS),
        "CLIP-PGS-0.5 trains in this time of plain CLIP": (0.55, FAILS),
        "CLIP-PGS-0.3 trains in this time of plain CLIP": (None, NOT_TESTABLE),
    }
    for claim, (ours, verdict) in expected.items():
        assert (found[claim]["ours"], found[claim]["verdict"]) == (ours and pytest.approx(ours), verdict), claim
    why = found["A-CLIP beats CLIP"]["why"]
    assert "30 processor minutes a run, 2 seeds, mean of a accuracy, b t2i@5" in why and "YFCC15M" in why
    put(tmp_path, "pretrain_study.json", rows[::2], data="toys", minutes=[30, 10])
    assert judged(tmp_path)["A-CLIP beats CLIP"]["ours"] is None, "half of tier 1 is no result yet"
    low, high = found["A-CLIP trains faster than SLIP"]["interval"]
    assert (low, high) == (pytest.approx(2.0 * 0.98 / 1.02), pytest.approx(2.0 * 1.02 / 0.98))


def test_models_are_told_by_their_recipes(tmp_path):
    folder = tmp_path / "composition"
    for model, wrong in (("pgs-0.3-digits", 4), ("clip-digits", 20)):
        write(tmp_path / model, "food101", DENSE, 1.0, hits(wrong), 1.0)
        record = read_records(tmp_path / model)[0]
        write_record(folder, replace(record, model=model), read_sides(tmp_path / model, record))
    row = judged(tmp_path)["CLIP-PGS-0.3 tells objects in captions better than CLIP (SugarCrepe)"]
    assert row["ours"] == pytest.approx(40.0) and row["verdict"] == HOLDS and "40 questions" in row["why"]
    assert self_named(folder, ("pgs-0.5",)) == {}


def test_print_holds_every_row(tmp_path):
    rows = list(judged(tmp_path).values())
    page = (tmp_path / "out" / "claims.md").read_text()
    assert table(rows) in page and all(f"* **{row['claim']}**" in page for row in rows)
    assert all(f"`{row['command']}`" in page for row in rows)
    assert table(rows).count("\n") == 1 + len(rows) + 3
    short, _, last = compact(rows).partition("\n\n")
    assert short.count("\n") == 1 + 1 + 1 and "9 of A-CLIP, 10 of CLIP-PGS" in last


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--results .*: no such folder"):
        main(ClaimsConfig(results=tmp_path / "absent"))
    (tmp_path / "search_cost.json").write_text("[]")
    with pytest.raises(UserError, match=r"search_cost\.json: no JSON object with rows"):
        claims.main(ClaimsConfig(results=tmp_path))
