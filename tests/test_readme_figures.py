"""Figures in the README's tables are those of the result files they cite, at the precision that is printed."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest

from eval.claims import all_claims
from eval.claims_files import Files
from eval.claims_print import compact
from eval.claims_rows import row_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")
MACS = (0.7, 0.56, 0.45)


def table(head: str) -> dict[str, list[str]]:
    """Label of each row -> its other cells, of the table whose head begins so."""
    lines = README.partition(f"\n{head}")[2].split("\n\n")[0].splitlines()[2:]
    assert lines, f"README.md has no table that begins with {head}"
    rows = [[cell.strip().replace("*", "") for cell in line.strip("|").split("|")] for line in lines]
    return {label: cells for label, *cells in rows}


def prints(text: str, *values: float) -> bool:
    """Whether the numbers of a cell are these, each rounded as it is printed."""
    found = [number.replace(",", "") for number in NUMBER.findall(text)]
    near = [abs(float(n) - v) <= 0.5 * 10 ** -len(n.partition(".")[2]) + 1e-9 for n, v in zip(found, values)]
    return len(found) == len(values) and all(near)


def rows_of(name: str) -> list[dict]:
    return json.loads((RESULTS / name).read_text())["rows"]


def one(rows: list[dict], **wanted) -> dict:
    """The first of the rows with these fields."""
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))


def check(wrong: list[str]) -> None:
    assert not wrong, "README.md differs from docs/results:\n" + "\n".join(wrong)


def test_comparison():
    names = {"`patchrank.apply`": "ours", "MLERP, blocks 2-10": "mlerp-2-10", "ToMe, blocks 2-10": "tome-2-10",
             "ToMe, every block (as published)": "tome", "EViT, one cut": "evit",
             "class attention, the rest dropped": "drop-class-attention"}  # fmt: skip
    rows, wrong = rows_of("compare_one_line.json"), []
    for label, cells in table("| | 70 % of the MACs: cosine").items():
        for place, cell in enumerate(cells):
            row = one(rows, rival=names[label], macs=MACS[place // 2])
            scale, name = ((1, "cosine"), (100, "agreement"))[place % 2]
            values = [scale * row[name]]
            if "[" in cell:
                values += [scale * end for end in row[f"{name}_against"]["interval"]]
            if not prints(cell, *values):
                wrong.append(f"{label}, {MACS[place // 2]}: {cell} is {values}")
    check(wrong)


def test_trained_towers():
    rows, wrong = rows_of("predictors_vit_tiny.json"), []
    most = max(row["num_images"] for row in rows)
    kinds = {"calibrated": ("linear scorer", "calibrated", "fold"), "frozen": ("linear scorer", "frozen", "fold"),
             "calibrated, `--lora-rank 4`": ("linear scorer, rank 4", "calibrated", "fold"),
             "untrained (`apply`)": ("ours", "training-free", "fold"),
             "the papers' way (rest dropped), trained, frozen":
             ("linear scorer, 1 summary tokens", "frozen", "drop")}  # fmt: skip
    for label, cells in table("| cosine / agreement % / top-1 %").items():
        for macs, cell in zip(MACS, cells, strict=True):
            own = [row for row in rows if row["budget"] == macs and row["num_images"] == most]
            if cell == "–":
                assert not [row for row in own if row["method"] == kinds[label][0]], "what was measured is shown"
                continue
            if label in kinds:
                row = one(own, **dict(zip(("method", "mode", "rest"), kinds[label])))
            else:
                mode = "calibrated" if "our calibration" in label else "training-free"
                rivals = [row for row in own if row["family"] == "rival" and row["mode"] == mode]
                row = max(rivals, key=lambda row: row["feature_cosine"])
                assert mode == "calibrated" or row["method"].startswith("tome"), "ToMe is the best of the rivals"
            values = [row["feature_cosine"], 100 * row["top1_agreement"], 100 * row["acc1"]]
            if not prints(cell, *values):
                wrong.append(f"{label}, {macs}: {cell} is {values}")
    check(wrong)


def test_time_of_choosing():
    rows = [row for row in rows_of("predictors_vit_tiny.json") if row["rest"] != "drop"]
    said = re.search(r"choosing patches in seven to nine\s+cuts costs (\d+) to (\d+) %\s+of the time", README)
    more = []
    for macs in MACS:
        theirs = one(rows, method="tome", mode="training-free", budget=macs)["ms_batch16"]
        for method, mode in (("ours", "training-free"), ("linear scorer", "frozen"), ("linear scorer", "calibrated")):
            more.append(100 * (one(rows, method=method, mode=mode, budget=macs)["ms_batch16"] / theirs - 1))
    assert [int(end) for end in said.groups()] == [round(min(more)), round(max(more))], more


def test_transfer():
    home, wrong = json.loads((RESULTS / "predictors_vit_tiny.json").read_text()), []
    for label, cells in table("| calibrated: cosine / points of top-1 lost").items():
        corrected = ", rank 4" if "--lora-rank 4" in label else ""
        kind = dict(method=f"linear scorer{corrected}", mode="calibrated", rest="fold")
        name = label.split()[0].lower().rstrip(",")
        away = RESULTS / f"predictors_{name}.json"
        found = json.loads(away.read_text()) if away.is_file() else home
        for macs, cell in zip(MACS, cells, strict=True):
            if cell == "–":
                continue
            row = one(found["rows"], budget=macs, **kind)
            lost, cosine = found["dense_acc1"] - row["acc1"], row["feature_cosine"]
            if name == "all":
                row = row["pooled"]
                lost, cosine = -row["paired_diff"], row["feature_cosine"]
                assert row["num_images"] == 9485
            high, low = row["paired_diff_ci95"]
            values = [cosine, 100 * lost, -100 * low, -100 * high]
            if not prints(cell, *values):
                wrong.append(f"{label}, {macs}: {cell} is {values}")
    check(wrong)


def test_retrieval_of_the_locked_tower():
    stem = "lit/flickr8k_test_1000_lit-vit-ti-clip-4dbae902_zeroshot-retrieval_captions"
    ways = {"Flickr8k test, text to image @1 / 5 / 10": ("image", "ours"),
            "image to text @1 / 5 / 10": ("text", "ours"),
            "calibrated: text to image": ("image", "ours-calibrated"),
            "calibrated: image to text": ("text", "ours-calibrated")}  # fmt: skip
    lines, wrong = table("| % | dense | 70 % of the MACs"), []
    for label, (way, method) in ways.items():
        for name, cell in zip(("dense", *(f"{method}_macs{macs}" for macs in MACS)), lines[label], strict=True):
            found = json.loads((RESULTS / f"{stem}_{name}.json").read_text())["metrics"]
            values = [100 * found[f"{way}_retrieval_recall@{k}"] for k in (1, 5, 10)]
            if cell and not prints(cell, *values):
                wrong.append(f"{label}, {name}: {cell} is {values}")
    check(wrong)


def test_pretraining_study():
    study = json.loads((RESULTS / "pretrain_study.json").read_text())
    rows = {row["recipe"]: row for row in study["rows"] if (row["tier"], row["seed"]) == (1, 0)}
    ahead = {(one["recipe"], one["metric"]): one for one in study["against_clip"] if one["tier"] == 1}
    found = table("| 30 processor minutes, seed 0 |")
    assert {label.split()[0] for label in found} == set(rows)
    for label, (steps, *cells) in found.items():
        name = label.split()[0]
        assert prints(steps, rows[name]["steps"])
        for cell, metric in zip(cells, ("caltech101 accuracy", "food101 accuracy"), strict=True):
            values = [rows[name]["metrics"][metric]]
            if name != "clip":
                values += [ahead[name, metric]["difference"], *ahead[name, metric]["interval"]]
            assert prints(cell.replace("+", ""), *(100 * value for value in values)), (name, cell)


def test_scorers_beside_golden_rankings():
    rows, wrong = rows_of("golden_match_fold.json"), []
    kinds = {"golden rankings": "g-golden", "golden rankings for 2,000 steps": "gl-golden",
             "unpruned features": "g-distill", "both": "g-both"}  # fmt: skip
    free = {"nothing, covering (`apply`)": "salient", "nothing, class attention": "class-attention"}
    for label, cells in table("| trained on, selected by | cosine").items():
        taught, _, selected = label.rpartition(", ")
        kind = "g-cover" if selected == "covering" else kinds.get(taught)
        names = [free[label]] if label in free else [f"trained: {kind}-{seed}" for seed in range(3)]
        own = [one(rows, method=name) for name in names]
        values = [mean(row[name] for row in own) for name in ("cosine", "match", "headroom")]
        pairs = zip(cells, values, strict=True)
        wrong += [f"{label}: {cell} is {value}" for cell, value in pairs if not prints(cell, value)]
    assert min(one(rows, method=f"trained: g-cover-{seed}")["headroom_interval"][0] for seed in range(3)) > 0.38
    assert one(rows, best_free=True)["method"] == "suppress"
    check(wrong)


def test_search_cost():
    names = {"nothing shared": "greedy-1-uncached", "one by one": "greedy-1", "eight by eight": "greedy-8"}
    rows, wrong = rows_of("search_cost.json"), []
    for label, (tmac, seconds, *qualities) in table("| per image, cut at layer 3").items():
        name = names.get(label.rpartition(", ")[2]) or label.partition("`")[2].partition("`")[0]
        both = [one(rows, strategy=name, rest=rest) for rest in ("fold", "drop")]
        for text, values in ((tmac, [row["macs_per_image"] / 1e12 for row in both]),
                             (seconds, [row["seconds_per_image"] for row in both])):  # fmt: skip
            parts = text.split(" / ") * (2 if "/" not in text else 1)  # one number stands for both
            if not all(prints(part, value) for part, value in zip(parts, values, strict=True)):
                wrong.append(f"{label}: {text} is {values}")
        for text, row in zip(qualities, both, strict=True):
            values = [row["quality"], *(row["quality_interval"] if "[" in text else [])]
            if not prints(text, *values):
                wrong.append(f"{label}, {row['rest']}: {text} is {values}")
    check(wrong)


def test_search_truth():
    rows, wrong = rows_of("search_truth.json"), []
    for label, (num, *cells) in table("| top-1 on golden keep sets").items():
        strategy, _, criterion = label.partition("`")[2].partition("`")[0].partition(" ")
        both = [one(rows, strategy=strategy, criterion=criterion or None, rest=rest) for rest in ("drop", "fold")]
        counts = [row["num_images"] for row in both]
        if not prints(num, *(counts if "/" in num else counts[:1])) or ("/" not in num and len(set(counts)) > 1):
            wrong.append(f"{label}: {num} is {counts}")
        for keep, cell in zip(("0.8", "0.6", "0.4"), cells, strict=True):
            values = [100 * row["acc1_at_keep"][keep] for row in both]
            if not prints(cell, *values):
                wrong.append(f"{label}, {keep}: {cell} is {values}")
    check(wrong)


def test_exported_graphs():
    names = {"dense": "dense", "drop, one cut": "drop-1", "fold, one cut": "fold-1", "fold, four cuts": "fold-4"}
    rows, wrong = rows_of("export_bench.json"), []
    for label, (ideal, *cells) in table("| | ideal, from MACs").items():
        for (precision, batch), cell in zip((("float32", 16), ("float32", 1), ("int8", 16)), cells, strict=True):
            row = one(rows, model="ViT-B-16", variant=names[label], runtime="onnxruntime-cpu", precision=precision,
                      batch=batch)  # fmt: skip
            values = [row["ms_p50"], row["speedup"]][: len(NUMBER.findall(cell))]
            if not (prints(cell, *values) and prints(ideal, row["ideal_speedup"])):
                wrong.append(
                    f"{label}, {precision}, batch {batch}: {ideal}, {cell} is {row['ideal_speedup']}, {values}"
                )
    check(wrong)


def test_load():
    rows, wrong = rows_of("serving_load.json"), []
    for load, cells in table("| offered, share of capacity").items():
        fixed, adaptive = (one(rows, mode=mode, load=float(load)) for mode in ("fixed", "adaptive"))
        pairs = [(cell, [row["ms_p50"], row["ms_p99"], row["refused"]]) for cell, row in zip(cells, (fixed, adaptive))]
        for cell, values in [*pairs, (cells[2], [100 * adaptive["accuracy_given_up"]])]:
            if not prints(cell, *values):
                wrong.append(f"{load}: {cell} is {values}")
    check(wrong)


def test_claims_are_those_of_the_files():
    """After new results: python -m eval claims, and its table into the README."""
    files = Files(RESULTS)
    rows = [row_of(claim, files) for claim in all_claims()]
    written = rows_of("claims.json")
    assert [(row["claim"], row["verdict"]) for row in written] == [(row["claim"], row["verdict"]) for row in rows]
    for old, new in zip(written, rows):
        assert [old["ours"], *(old["interval"] or [])] == pytest.approx([new["ours"], *(new["interval"] or [])])
    assert "| claim | reported |" not in README or compact(written) in README


def test_every_result_names_its_command():
    said = (RESULTS / "README.md").read_text()
    lines = {line.split("|")[1]: line for line in said.splitlines() if line.startswith("| `")}
    for path in RESULTS.glob("*.json"):
        own = [line for names, line in lines.items() if f"`{path.name}`" in names]
        assert own and "`python -m " in own[0], f"docs/results/README.md: no command for {path.name}"
