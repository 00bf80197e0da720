"""`python -m eval report` on records written by hand: differences, verdicts, means, tables, the page itself."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from eval import report
from eval.records import CLASSIFICATION, DENSE, PROBE, RETRIEVAL, Record, text_sha256, write_record
from eval.report import ReportConfig
from eval.report_data import SEVEN, panels_of, read_results, title_of
from eval.report_figures import MEAN_TITLE, figures_of
from eval.report_kept import faded, sheets_of
from eval.report_lines import best_rival, headlines, lines_of
from eval.report_plots import PanelData, Point, drawn, loss_panel, lowest_shown, tidy_svg
from eval.report_reported import our_lines, reported_lines
from eval.report_retrieval import WAYS, retrieval_head, retrieval_lines, title_of_panel
from eval.report_rows import Difference, front, interpolated
from eval.report_sheet import image_of, pruned_picture
from eval.report_style import BACKDROP, looks_of
from eval.retrieval import IMAGE
from patchrank.errors import UserError

NUM = 40
SETS = {"food101": PROBE, "tiny-imagenet": CLASSIFICATION}
MACS = (0.7, 0.45)


def jpeg() -> str:
    """A green picture."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (20, 160, 60)).save(file, format="JPEG")
    return base64.b64encode(file.getvalue()).decode()


def hits(wrong: int, num: int = NUM) -> np.ndarray:
    """All right but the first `wrong` images."""
    return np.arange(num) >= wrong


def write(folder: Path, dataset: str, method: str, macs: float, hit_I: np.ndarray, cosine: float, share=None) -> None:
    ids = [f"{dataset}/{number}" for number in range(len(hit_I))]
    share = macs if share is None else share
    record = Record(
        dataset=dataset, model="tiny", pretrained="", task=SETS[dataset], method=method, macs=macs,
        image_macs=round(share * 1_000_000), dense_macs=1_000_000, protocol="probe-dense", split="test",
        split_source="split.json", split_sha256="0" * 64, num_images=len(ids), images_sha256=text_sha256(ids),
        weights_hash="f" * 64, metrics={"acc1": float(hit_I.mean()), "cosine": cosine}, main_metric="acc1",
    )  # fmt: skip
    rng = np.random.default_rng(round(1000 * cosine))
    sides = {"ids": np.array(ids), "correct": hit_I, "cosine": cosine + rng.normal(0, 1e-3, len(ids))}
    write_record(folder, record, sides)


def write_retrieval(folder: Path, method: str, macs: float, found_I: np.ndarray, share: float | None = None) -> None:
    """Retrieval both ways, with the same images found at every k; at k=10 all of them."""
    ids = [f"pairs/{number}" for number in range(len(found_I))]
    names = {way.format(k): found_I if k < 10 else np.ones_like(found_I) for way in WAYS for k in (1, 5, 10)}
    record = Record(
        dataset="pairs", model="tiny", pretrained="", task=RETRIEVAL, method=method, macs=macs,
        image_macs=round((macs if share is None else share) * 1_000_000), dense_macs=1_000_000, protocol="captions",
        split="test", split_source="captions.json", split_sha256="0" * 64, num_images=len(ids),
        images_sha256=text_sha256(ids), weights_hash="f" * 64, settings={"recall": [1, 5, 10]},
        metrics={name: float(value.mean()) for name, value in names.items()} | {"cosine": 0.9},
        main_metric=IMAGE.format(5),
    )  # fmt: skip
    write_record(folder, record, {"ids": np.array(ids), "cosine": np.full(len(ids), 0.9), **names})


def speed_file() -> dict:
    rows = [
        dict(method=name, macs=macs, image_macs=1, dense_macs=1, batch=16, ms=[1.0], dense_ms=[1.2], speedup=1.2 / macs,
             speedup_quartiles=[1.0, 1.5], ideal_speedup=1 / macs, images_per_s=120 / macs)
        for name in ("ours", "tome", "low-resolution") for macs in MACS
    ]  # fmt: skip
    return dict(kind="throughput", weights_hash="f" * 64, runtime="torch", device="cpu", precision="float32", batch=16,
                threads=1, rounds=5, dense_images_per_s=100.0, command="python -m eval suite", rows=rows)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """tome is far better than ours on every set, random far worse, evit the same; one row misses its budget."""
    folder = tmp_path_factory.mktemp("results")
    for dataset in SETS:
        write(folder, dataset, DENSE, 1.0, hits(2), 1.0)
        write(folder, dataset, DENSE, 1.0, hits(2, 5), 1.0)
        for macs in MACS:
            write(folder, dataset, "ours", macs, hits(10), 0.95)
            write(folder, dataset, "tome", macs, hits(3), 0.97)
            write(folder, dataset, "evit", macs, np.roll(hits(10), 1), 0.95)
            write(folder, dataset, "ours-trained", macs, hits(2), 0.96)
            write(folder, dataset, "drop-random", macs, hits(30), 0.80)
            write(folder, dataset, "low-resolution", macs, hits(1), 0.99, share=macs + 0.1)
            write(folder, dataset, "golden-fold", macs, hits(0, 5), 0.999)
    grid = dict(grid=[2, 2], layers=[1], dataset="food101", method="ours", macs=0.45)
    entry = dict(id="food101/1", cosine=0.9, truth="pie", dense_answer="pie", answer="cake", kept=[[0, 3]], jpeg=jpeg())
    sheet = grid | dict(best=[entry], worst=[entry])
    sets = [{"name": "food101", "title": "Food101", "state": "measured", "text": "40 test images"}]
    sets += [{"name": "dtd", "title": "DTD", "state": "loader verified, images not present", "text": "1,692 listed"}]
    files = {
        "speed_tiny": speed_file(),
        "speed_tiny_onnx": speed_file() | dict(runtime="onnxruntime", dense_images_per_s=110.0),
        "pictures_tiny": dict(kind="pictures", weights_hash="f" * 64, sheets=[sheet]),
        "suite_tiny": dict(
            kind="suite", weights_hash="f" * 64, command="python -m eval suite", sets=sets, unreached=[],
            methods=[dict(name="ours", text="our text", state="measured"),
                     dict(name="dtem", text="DTEM", state="skipped", reason="needs a trained embedding")],
        ),
    }  # fmt: skip
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def results(folder: Path):
    (found,) = read_results(folder)
    return found


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    report.main(ReportConfig(results=folder, out=out))
    return out


def line(results, method: str, macs: float = 0.45):
    (found,) = [one for one in lines_of(results, macs) if one.method == method]
    return found


def test_differences_are_paired_and_named(results) -> None:
    tome, evit, random = (line(results, name).cells["food101"].hit_against for name in ("tome", "evit", "drop-random"))
    assert tome.mean == pytest.approx((10 - 3) / NUM) and tome.verdict == "better" and tome.low > 0
    assert random.mean == pytest.approx((10 - 30) / NUM) and random.verdict == "worse"
    assert evit.mean == pytest.approx(0.0) and evit.verdict == "tie"
    assert line(results, "ours").cells["food101"].hit_against is None


def test_rows_of_another_probe_are_not_mixed_in(results) -> None:
    (panel,) = [one for one in results.panels if one.dataset == "food101"]
    rows = [panel.dense, *panel.rows.values()]
    other = replace(panel.rows["tome", 0.7].record, settings={"C": 3.0})
    (found,) = panels_of([one if one.key != ("tome", 0.7) else replace(one, record=other) for one in rows])
    assert panel.rows.keys() - found.rows.keys() == {("tome", 0.7)}


@pytest.fixture(scope="module")
def pairs(folder: Path, tmp_path_factory) -> Path:
    """The same results with retrieval: unpruned finds 32 of 40 images, ours 28, tome 12, a smaller image 30."""
    copy = tmp_path_factory.mktemp("pairs") / "results"
    shutil.copytree(folder, copy)
    for method, macs, wrong, share in (
        (DENSE, 1.0, 8, None), ("ours", 0.7, 12, None), ("tome", 0.7, 28, None), ("low-resolution", 0.7, 10, 0.8)
    ):  # fmt: skip
        write_retrieval(copy, method, macs, hits(wrong), share)
    return copy


def test_retrieval_is_held_against_the_unpruned_tower_and_ours(pairs: Path, results) -> None:
    (found,) = read_results(pairs)
    (panel,) = found.retrieval
    assert found.methods == results.methods and len(found.others) == len(results.others), "no row stands twice"
    assert title_of_panel(panel) == "pairs, 40 test images"
    head, lines = retrieval_head(panel), retrieval_lines(panel, 0.7)
    cells = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    assert list(cells) == ["unpruned", "low-resolution", "ours", "tome"]
    assert cells["ours"]["text to image @ 1 / 5 / 10, %"] == "70.0 / 70.0 / 100.0"
    assert cells["ours"]["@5 to unpruned"].startswith("−10.0 [") and cells["ours"]["@5 to unpruned"].endswith("▼")
    assert cells["tome"]["@5 to ours"].startswith("−40.0 [") and cells["ours"]["@5 to ours"] == ""
    assert cells["low-resolution"]["MACs %"] == "80.0 !" and cells["low-resolution"]["@5 to ours"] == ""
    assert cells["unpruned"]["@5 to unpruned"] == "" and cells["unpruned"]["MACs %"] == "100.0"


def test_retrieval_stands_in_all_that_is_written(pairs: Path, made: Path, tmp_path: Path) -> None:
    report.main(ReportConfig(results=pairs, out=tmp_path))
    rows = list(csv.DictReader((tmp_path / "retrieval.csv").open()))
    assert len(rows) == 3 * 6
    (row,) = [one for one in rows if (one["method"], one["metric"]) == ("tome", "text_retrieval_recall@5")]
    assert float(row["value"]) == pytest.approx(0.3) and float(row["minus_ours"]) == pytest.approx(-0.4)
    assert float(row["minus_dense_high"]) < 0 and row["verdict_to_ours"] == "worse"
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "pairs, 40 test images" in text and "−40.0 [" in text
        assert "Retrieval" not in (made / name).read_text(), "nothing where there is none"
    assert not (made / "retrieval.csv").exists()


def test_an_interval_that_touches_zero_is_a_tie() -> None:
    assert Difference(0.01, 0.0, 0.02, 9).verdict == Difference(-0.01, -0.02, 0.0, 9).verdict == "tie"


def test_means_are_recomputed_over_the_sets_and_oracles_stay_out(results) -> None:
    assert line(results, "tome").mean.acc1 == pytest.approx(37 / 40)
    assert line(results, "tome").mean.num_images == 2 * NUM
    golden = line(results, "golden-fold")
    assert golden.is_oracle and golden.mean is None
    cell = golden.cells["food101"]
    assert (cell.num_images, cell.is_short, cell.acc1) == (5, True, 1.0)
    assert cell.dense_acc1 == pytest.approx(3 / 5)
    assert cell.hit_against.mean == pytest.approx(1.0)  # ours is wrong on all five


def test_a_missed_budget_is_held_against_our_curve(results) -> None:
    found = line(results, "low-resolution", 0.7)
    assert found.misses and found.mean.hit_against is None
    ours_there = 30 / 40 + (38 - 30) / 40 * (0.8 - 0.7) / 0.3
    assert found.mean.curve_gain == pytest.approx(39 / 40 - ours_there)
    assert best_rival(lines_of(results, 0.7)).method == "tome"


def test_headlines_say_who_loses(results) -> None:
    found = headlines(results)
    assert "`ours` loses to the best rival, `tome`: −17.5 points" in found[0].replace("-", "−")
    assert "mean of 2 data sets" in found[0] and len(found) == 3 * len(MACS)
    assert "`ours-trained` ties with it: +2.5 points of top-1" in found[2]


@pytest.mark.parametrize(
    "points, expected",
    [
        ([(1.0, 5.0), (2.0, 4.0), (3.0, 6.0)], {2}),
        ([(1.0, 5.0), (2.0, 4.0), (3.0, 3.0), (2.5, 2.0)], {0, 1, 2}),
        ([(1.0, 5.0), (1.005, 4.0), (1.02, 4.5)], {0, 2}),
    ],
)
def test_the_front_holds_what_nothing_beats(points, expected) -> None:
    assert set(front(points)) == expected


def test_interpolation_ends_with_the_curve() -> None:
    curve = [(0.5, 0.6), (1.0, 0.8)]
    assert interpolated(curve, 0.75) == pytest.approx(0.7)
    assert interpolated(curve, 0.4) is None and interpolated([], 0.5) is None


def test_figures_have_the_mean_first_and_every_row(results) -> None:
    figures = {one.name: one for one in figures_of(results)}
    assert list(figures) == ["speed", "speed_onnxruntime", "macs", "loss", "cosine"]
    titles = [panel.title.split(" (")[0] for panel in figures["loss"].panels]
    assert titles == [MEAN_TITLE, "Food101", "Tiny-ImageNet"]
    food = figures["loss"].panels[1]
    at = {(point.method, point.macs): point.y for point in food.points}
    assert at["ours", 0.7] == pytest.approx(20.0) and at["golden-fold", 0.7] == pytest.approx(-40.0)
    assert {point.method for point in figures["speed"].panels[0].points} == {"ours", "tome", "low-resolution"}
    golden = {point.macs: point.y for point in figures["macs"].panels[1].points if point.method == "golden-fold"}
    assert golden[0.7] == pytest.approx(95.0 + 40.0)  # its distance to the unpruned tower on its own five images


def test_legends_name_what_the_figure_shows(results, made: Path) -> None:
    figures, looks = {one.name: one for one in figures_of(results)}, looks_of(results.methods)
    assert list(drawn(looks, figures["loss"].panels)) == [name for name in looks if name != DENSE]
    assert set(drawn(looks, figures["speed"].panels)) == {"ours", "tome", "low-resolution"}
    page = (made / "report.html").read_text()
    legends = re.findall(r'<div class="legend">(.*?)</div>', page, flags=re.DOTALL)
    assert len(legends) == 5 and [("evit" in one) for one in legends] == [False, False, True, True, True]


def test_axes_hold_what_there_is_even_gains_alone() -> None:
    gain = Point("ours", 0.7, 70.0, -1.5, "a gain")
    data = PanelData("gains", Point(DENSE, 1.0, 100.0, 0.0, "unpruned"), [gain])
    axes = Figure().add_subplot()
    loss_panel(axes, data, looks_of(["ours"]), y_label="lost", ticks=(-2, -1, 0, 1, 2))
    low, high = axes.get_ylim()
    assert low < -1.5 and high > 0 and [tick for tick in axes.get_yticks() if low < tick < high] == [-1, 0, 1]
    assert lowest_shown(replace(data, points=[replace(gain, y=-4.0)])) == pytest.approx(-12.0)


def test_csv_holds_every_number(made: Path, results) -> None:
    rows = list(csv.DictReader((made / "report.csv").open()))
    assert len(rows) == len(MACS) * (6 * 3 + 2)
    (row,) = [x for x in rows if (x["dataset"], x["method"], x["budget"]) == ("mean", "tome", "0.7")]
    against = line(results, "tome", 0.7).mean.hit_against
    assert float(row["acc1_minus_ours_low"]) == pytest.approx(against.low) and row["acc1_verdict"] == "better"
    assert float(row["images_per_s torch"]) == pytest.approx(120 / 0.7)


def test_markdown_shows_tables_figures_and_absent_sets(made: Path) -> None:
    text = (made / "report.md").read_text()
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert Image.open(made / name).size[0] > 250
    assert "| DTD | loader verified, images not present |" in text
    assert "| tome | 70.0 | 171 (×1.71) | 92.5 | +17.5 [" in text and "(reported)" in text
    assert "dtem: needs a trained embedding" in text and "![kept patches](kept.png)" in text


def test_the_page_is_whole_in_itself(made: Path) -> None:
    page = (made / "report.html").read_text()
    assert not re.findall(r"<(?:script|link|iframe)\b", page)
    fetched = re.findall(r'(?:src|href|xlink:href)="(?!#|data:)([^"]+)"', page)
    assert not fetched and "@import" not in page and "url(http" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert page.count("<figure>") >= 4 * 3 and "oracle" in page and "golden-fold at 70 %: 135.0" in page


def test_all_seven_sets_are_on_the_page(made: Path) -> None:
    page = (made / "report.html").read_text()
    for name in SEVEN:
        assert f"<b>{title_of(name)}</b>" in page


def test_photographs_can_be_left_out(results, made: Path) -> None:
    assert (made / "report.html").read_text().count(jpeg()) == 4  # best and worst, each whole and pruned
    for with_photo, num in ((True, 2), (False, 1)):
        (sheet,) = sheets_of(results.pictures, with_photo)
        (entry,) = sheet["groups"][0]["entries"]
        assert len(entry["svgs"]) == num and (jpeg() in "".join(entry["svgs"])) == with_photo
        assert "2 of 4 patches kept" in entry["svgs"][-1]
    drawn = {"sheets": [one | {"drawn": True} for one in results.pictures["sheets"]]}
    assert jpeg() in "".join(sheets_of(drawn, False)[0]["groups"][1]["entries"][0]["svgs"])


def test_the_sheet_fades_what_left(results) -> None:
    entry = results.pictures["sheets"][0]["best"][0]
    whole_HW3 = image_of(entry, (2, 2))
    pruned_HW3 = pruned_picture(whole_HW3, entry, (2, 2)).astype(int)
    assert (pruned_HW3[:16, :16] == whole_HW3[:16, :16]).all() and (pruned_HW3[:16, 16:] > 200).all()
    assert pruned_picture(None, entry, (2, 2))[0, 0].tolist() == [100, 116, 139]


def test_patches_that_left_are_covered() -> None:
    assert faded([0, 3], (2, 2)).split("M")[1:] == ["80.00 0.00h80.00v80.00h-80.00z", "0.00 80.00h80.00v80.00h-80.00z"]


def test_paper_rows_stand_beside_ours_with_recomputed_means(results) -> None:
    lines = {(one.name, one.source): one for one in reported_lines()}
    (evit,) = [one for (name, _), one in lines.items() if name == "EViT"]
    assert evit.mean == pytest.approx(np.mean([92.5, 87.1, 67.1, 80.3, 23.3, 43.3, 63.3])) and evit.is_reported
    assert evit.lost == pytest.approx(67.857 - 65.271, abs=1e-2)
    ours = our_lines(results)
    assert [one.cost for one in ours] == ["100 % of MACs", "70 % of MACs", "45 % of MACs"]
    assert ours[1].lost == pytest.approx(20.0) and ours[1].mean is None and not ours[1].is_reported


def test_members_of_a_family_share_a_colour_but_not_a_line() -> None:
    looks = looks_of(["tome", "tome-2-5", "ours", "fold-centre"])
    assert looks["tome"].colour == looks["tome-2-5"].colour and looks["tome"].line != looks["tome-2-5"].line
    assert looks["ours"].width > looks["tome"].width and looks["fold-centre"].colour == BACKDROP
    assert looks_of(["tome", "tome-2-5"], shown=["tome"])["tome-2-5"].colour == BACKDROP
    strong = looks_of(["tome", "fold-centre"], strongest=["fold-centre"])["fold-centre"]
    assert strong.colour != BACKDROP and strong.width > looks["tome"].width


def test_svg_ids_stay_apart() -> None:
    text = '<?xml?><svg width="1pt" height="2pt"><g id="a"/><use href="#a" clip-path="url(#a)"/><g id="tip:x &amp; y">'
    tidy = tidy_svg(text, "one panel")
    assert 'id="one-panel-a"' in tidy and 'href="#one-panel-a"' in tidy and "url(#one-panel-a)" in tidy
    assert "<title>x &amp; y</title>" in tidy and 'aria-label="one panel"' in tidy and "1pt" not in tidy


@pytest.mark.parametrize(
    "changes, part",
    [(dict(results=Path("nowhere")), "no such folder"), (dict(model="other"), "not among the results")],
)
def test_mistakes_are_named(folder: Path, tmp_path: Path, changes: dict, part: str) -> None:
    with pytest.raises(UserError, match=part):
        report.main(replace(ReportConfig(results=folder, out=tmp_path), **changes))


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing but the dense tower"):
        read_results(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        read_results(tmp_path)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.system
@pytest.mark.timeout(400)
@pytest.mark.skipif(BROWSER is None, reason="no browser: install chromium from the system's packages")
def test_a_real_browser_shows_text_and_pictures(made: Path, tmp_path: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'user'}"]
    page = f"file://{(made / 'report.html').resolve()}"
    dom = subprocess.run([BROWSER, *flags, "--dump-dom", page], capture_output=True, text=True, timeout=100).stdout
    assert "Accuracy versus throughput" in dom and "loses to" in dom and dom.count("<svg") > 12
    shot = tmp_path / "shot.png"
    subprocess.run([BROWSER, *flags, "--window-size=1280,9000", f"--screenshot={shot}", page], check=True, timeout=100)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    orange = (abs(pixels - np.array([0xC2, 0x41, 0x0C])).sum(-1) < 20).nonzero()
    assert len(orange[0]) > 1500 and orange[0].max() - orange[0].min() > 3000  # our line, in every figure
    assert (pixels[:200, :, :].mean(-1) < 80).mean() > 0.5  # the dark head
