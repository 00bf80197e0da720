"""`python -m eval compare` end to end on a tiny saved model: rows, differences, resuming, missed budgets, errors."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from PIL import Image

from eval import compare, compare_report, compare_rows
from eval.compare import CompareConfig, main
from eval.compare_rows import Against, CompareRow, best_rival, make_rows
from eval.journal import Journal
from eval.rivals import OURS, TRAINING_FREE, build
from patchrank.classifier import classifier
from patchrank.data import load_dataset
from patchrank.errors import UserError
from patchrank.loading import load_clip
from patchrank.macs import dense_macs

SOME = ("tome", "evit", "drop-random")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> CompareConfig:
    return CompareConfig(
        model=str(model), limit=7, batch_size=3, macs=(0.8, 0.7), rivals=SOME, threads=1, out=tmp_path / "out"
    )


def results(config: CompareConfig) -> dict:
    return json.loads((config.out / "compare.json").read_text())


def by_hand(config: CompareConfig, name: str, macs: float) -> dict[str, torch.Tensor]:
    """Cosine, agreement and hit of every image, one at a time."""
    clip, dataset = load_clip(config.model), load_dataset("digits", split="val")
    logits = classifier(clip, dataset)
    ids = [
        image_id
        for record in Journal(config.out / "compared.jsonl", ("batch", "rival", "macs"))
        if record["rival"] == "dense"
        for image_id in record["ids"]
    ]
    items = {item.id: item for item in dataset.images}
    rival, found = build(name, clip.tower, macs), {"cosine": [], "agreement": [], "acc1": []}
    with torch.no_grad():
        for image_id in ids:
            image = clip.preprocess(dataset.open(image_id)).unsqueeze(0)
            dense, feature = clip.tower(image), rival(image)
            answer = logits(feature).argmax().item()
            found["cosine"].append(F.cosine_similarity(feature, dense).item())
            found["agreement"].append(float(answer == logits(dense).argmax().item()))
            found["acc1"].append(float(answer == items[image_id].label))
    return {key: torch.tensor(values, dtype=torch.float64) for key, values in found.items()}


def test_rows_are_what_each_image_says(config: CompareConfig, capsys) -> None:
    main(config)
    found = results(config)
    assert [(row["rival"], row["macs"]) for row in found["rows"]] == [
        (name, macs) for macs in (0.8, 0.7) for name in (OURS, *SOME)
    ]
    assert found["num_images"] == 7 and found["broken"] == [] and found["unreached"] == []
    assert found["command"].startswith("python -m eval") and "torch" in found["versions"]
    ours = by_hand(config, OURS, 0.7)
    for row in found["rows"][4:]:
        one = by_hand(config, row["rival"], 0.7)
        for name in ("cosine", "agreement", "acc1"):
            assert row[name] == pytest.approx(one[name].mean().item(), abs=1e-5)
            if row["rival"] == OURS:
                assert row[f"{name}_against"] is None
            else:
                against = row[f"{name}_against"]
                assert against["mean"] == pytest.approx((one[name] - ours[name]).mean().item(), abs=1e-5)
                low, high = against["interval"]
                assert low - 1e-9 <= against["mean"] <= high + 1e-9
    printed = capsys.readouterr().out
    assert "70 % of the MACs, 7 images, unpruned top-1" in printed and "the best rival" in printed
    markdown = (config.out / "compare.md").read_text()
    assert markdown.count("| tome |") == 2 and compare_report.NOTE in markdown
    rows = list(csv.DictReader((config.out / "compare.csv").open()))
    assert len(rows) == 8 and float(rows[5]["cosine"]) == found["rows"][5]["cosine"]


def test_a_second_run_computes_nothing_and_a_killed_one_goes_on(config: CompareConfig, monkeypatch) -> None:
    main(config)
    first = results(config)
    journal = config.out / "compared.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:11]) + lines[11][:20])
    main(config)
    assert results(config) == first
    monkeypatch.setattr(compare, "_measure_batch", None)
    main(config)
    assert results(config) == first


def test_rows_and_budgets_may_grow(config: CompareConfig) -> None:
    main(config)
    first = results(config)["rows"]
    main(replace(config, macs=(0.8, 0.7, 0.75), rivals=(*SOME, "drop-centre")))
    second = {(row["rival"], row["macs"]): row for row in results(config)["rows"]}
    assert len(second) == 15
    assert all(second[row["rival"], row["macs"]] == row for row in first)


def test_other_settings_need_another_folder(config: CompareConfig) -> None:
    main(config)
    with pytest.raises(UserError, match=r"was begun with other settings: .*images"):
        main(replace(config, limit=5))


def test_what_cannot_be_reached_is_said(config: CompareConfig, capsys) -> None:
    main(replace(config, macs=(0.45,), rivals=("tome-3-6", "low-resolution")))
    found = results(config)
    assert [one["rival"] for one in found["unreached"]] == ["tome-3-6"]
    assert "no row for tome-3-6 at 45 %: macs=0.45: this method reaches" in capsys.readouterr().out
    coarse = found["rows"][1]
    assert coarse["rival"] == "low-resolution" and coarse["misses_budget"]
    assert f"{100 * coarse['macs_share']:.1f}!" in (config.out / "compare.md").read_text()


def test_pictures_without_classes_have_cosine_only(config: CompareConfig, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.effect_noise((40, 40), 90 + number).convert("RGB").save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    main(replace(config, data="folder", data_root=folder, limit=None))
    found = results(config)
    assert found["num_images"] == 3 and found["broken"] == ["broken.png"]
    row = found["rows"][1]
    assert row["agreement"] is row["acc1"] is row["acc1_against"] is None and row["cosine_against"] is not None
    assert "-" in (config.out / "compare.md").read_text()


def test_nothing_but_broken_pictures_is_an_error(config: CompareConfig, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="every image of the 1 is broken"):
        main(replace(config, data="folder", data_root=folder, limit=None))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rivals": ("tomee",)}, "--rivals tomee: unknown; choose from ours, "),
        ({"macs": ()}, "--macs .*one or more different"),
        ({"macs": (0.7, 0.7)}, "--macs 0.7 0.7: .*different"),
        ({"macs": (1.2,)}, "--macs 1.2: must lie in"),
        ({"macs": (0.01,)}, "macs=0.01: this image tower reaches"),
        ({"batch_size": 0}, "--batch-size 0: must be 1 or more"),
        ({"limit": 0}, "--limit 0: must be 1 or more"),
        ({"data": "no-such"}, "data set 'no-such': unknown"),
        ({"device": "tpu"}, "--device tpu"),
    ],
)
def test_mistakes_are_named(config: CompareConfig, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        main(replace(config, **changes))
    assert not config.out.exists()


def test_defaults_name_every_rival() -> None:
    assert CompareConfig().rivals == TRAINING_FREE and TRAINING_FREE[0] == OURS


def make_journal(path: Path, cosines: dict[str, list[float]]) -> Journal:
    journal = Journal(path, ("batch", "rival", "macs"))
    journal.add({"batch": 0, "rival": "dense", "macs": 1.0, "ids": list("abcd"), "hit": None})
    for rival, values in cosines.items():
        for batch in (2, 0):  # out of order, as after a resumed run
            part = values[batch : batch + 2]
            journal.add({"batch": batch, "rival": rival, "macs": 0.7, "cosine": part, "agrees": None, "hit": None})
    return journal


def test_differences_are_paired_by_image(tmp_path: Path) -> None:
    config = make_tower().config
    cosines = {OURS: [0.9, 0.1, 0.5, 0.7], "tome": [0.8, 0.0, 0.4, 0.6], "evit": [0.95, 0.15, 0.55, 0.75]}
    macs_of = {(rival, 0.7): round(0.7 * dense_macs(config)) for rival in cosines}
    macs_of["evit", 0.7] = round(0.72 * dense_macs(config))
    rows = make_rows(make_journal(tmp_path / "journal", cosines), macs_of, config)
    assert rows[1].cosine_against.mean == pytest.approx(-0.1)
    assert rows[1].cosine_against.interval == pytest.approx((-0.1, -0.1)), "the same on every image"
    assert [row.misses_budget for row in rows] == [False, False, True]
    assert best_rival(rows).rival == "tome", "a row that costs more is no rival"
    assert compare_report.headlines(rows) == [
        "at 70 % of the MACs ours beats the best rival, tome: cosine +0.1000 [+0.1000, +0.1000]"
    ]


@pytest.mark.parametrize(
    ("interval", "verdict"), [((0.01, 0.03), "loses to"), ((-0.03, -0.01), "beats"), ((-0.01, 0.01), "is level with")]
)
def test_the_headline_follows_the_interval(interval: tuple[float, float], verdict: str) -> None:
    against = Against(mean=sum(interval) / 2, interval=interval)
    one = CompareRow(
        rival=OURS,
        text="",
        macs=0.7,
        macs_share=0.7,
        macs_per_image=7,
        misses_budget=False,
        num_images=4,
        cosine=0.9,
        agreement=None,
        acc1=None,
        dense_acc1=None,
        cosine_against=None,
        agreement_against=None,
        acc1_against=None,
    )
    rival = replace(one, rival="tome", cosine_against=against)
    assert verdict in compare_report.headlines([one, rival])[0]
    assert asdict(rival)["cosine_against"]["interval"] == interval
    assert compare_rows.best_rival([one, replace(one, rival="ours-low-latency")]) is None
