"""`python -m eval zero-shot`: records are what each image says, are not measured twice, and say how it was done."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eval import measuring, protocols, zero_shot
from eval.measuring import open_bench
from eval.protocols import PER_CLASS_SETS, PROTOCOLS, VTAB_NAMES, load_for
from eval.records import read_records, read_sides
from eval.rivals import build
from eval.zero_shot import ZeroShotConfig, classification_metrics, main
from patchrank.classifier import classifier
from patchrank.data import CATALOG, load_dataset
from patchrank.errors import UserError
from patchrank.loading import load_clip
from patchrank.macs import dense_macs, pruned_macs
from patchrank.presets import one_cut


@pytest.fixture
def config(model, tmp_path) -> ZeroShotConfig:
    shared = dict(threads=1, cache=tmp_path / "cache", out=tmp_path / "out")
    return ZeroShotConfig(model=str(model), limit=12, methods=("ours", "tome"), macs=(0.8, 0.7), **shared)


def test_records_are_what_each_image_says(config, capsys):
    main(config)
    records = {(record.method, record.macs): record for record in read_records(config.out)}
    assert set(records) == {("dense", 1.0)} | {(name, macs) for name in ("ours", "tome") for macs in (0.8, 0.7)}
    clip, dataset = load_clip(config.model), load_dataset("digits")
    logits, items = classifier(clip, dataset), {item.id: item for item in dataset.images}
    record = records["tome", 0.7]
    sides = read_sides(config.out, record)
    assert len(sides["ids"]) == record.num_images == 12
    rival = build("tome", clip.tower, 0.7)
    for place, id in enumerate(sides["ids"]):
        image = clip.preprocess(dataset.open(str(id))).unsqueeze(0)
        with torch.no_grad():
            feature, dense = rival(image), clip.tower(image)
        assert sides["answer"][place] == logits(feature).argmax().item()
        assert sides["correct"][place] == (sides["answer"][place] == items[id].label)
        assert sides["agrees"][place] == (sides["answer"][place] == logits(dense).argmax().item())
        assert sides["cosine"][place] == pytest.approx(F.cosine_similarity(feature, dense).item(), abs=1e-4)
    for name, side in (("acc1", "correct"), ("agreement", "agrees"), ("cosine", "cosine")):
        assert record.metrics[name] == pytest.approx(sides[side].mean(), abs=1e-6)
    assert record.image_macs == rival.macs and record.dense_macs == dense_macs(clip.tower.config)
    assert record.weights_hash == clip.weights_hash and record.main_metric == "acc1" and record.protocol == "coop"
    assert record.versions["torch"] and record.host["threads"] == 1 and record.command.startswith("python -m eval")
    printed = capsys.readouterr().out
    assert "dense" in printed and "12 images of test" in printed
    rows = list(csv.DictReader((config.out / "zero-shot.csv").open()))
    assert {(row["method"], float(row["macs"])) for row in rows} == set(records)
    assert {float(row["acc1"]) for row in rows} == {record.metrics["acc1"] for record in records.values()}
    assert json.loads((config.out / "settings/zero-shot.json").read_text())["limit"] == 12


def test_nothing_is_measured_twice_and_rows_may_grow(config, monkeypatch):
    main(config)
    first = read_records(config.out)
    monkeypatch.setattr(measuring, "extract", None)
    main(config)
    assert read_records(config.out) == first
    monkeypatch.undo()
    asked, real = [], measuring.extract
    monkeypatch.setattr(
        measuring, "extract", lambda *args, **kw: asked.append([m.name for m in args[3]]) or real(*args, **kw)
    )
    main(replace(config, methods=("ours", "tome", "evit"), macs=(0.7,)))
    assert asked == [["dense", "evit"]]
    assert len(read_records(config.out)) == len(first) + 1
    main(replace(config, limit=9))
    assert len({record.images_sha256 for record in read_records(config.out)}) == 2


def test_keep_means_the_cost_of_one_dropping_cut(config):
    main(replace(config, macs=(), keep=(0.5,), methods=("drop-random", "ours")))
    tower = load_clip(config.model).tower.config
    expected = pruned_macs(tower, one_cut(tower, 0.5, rest="drop")) / dense_macs(tower)
    for record in read_records(config.out)[1:]:
        assert record.keep == 0.5 and record.macs == pytest.approx(expected)
        assert record.macs_share == pytest.approx(expected, rel=0.05)


def test_a_head_answers_by_itself(config, monkeypatch):
    clip = load_clip(config.model)
    clip = replace(clip, text=None, class_head=(torch.randn(10, 24), torch.randn(10)))
    with open_bench(config, clip) as bench:
        records = zero_shot.measure(replace(config, protocol="openai"), bench, "digits")
    assert {record.protocol for record in records} == {"head"}
    assert {record.templates_sha256 for record in records} == {None} and records[0].classnames_sha256


def test_metrics_by_hand():
    logit_IY = torch.tensor([[5.0, 4, 3, 2, 1, 0], [5.0, 4, 3, 2, 1, 0], [0.0, 1, 2, 3, 4, 5]])
    found = classification_metrics(logit_IY, torch.tensor([0, 5, 1]))
    assert found == {"acc1": pytest.approx(1 / 3), "mean_per_class_recall": pytest.approx(1 / 3), "acc5": 2 / 3}
    assert "acc5" not in classification_metrics(logit_IY[:, :4], torch.tensor([0, 1, 1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("nonsense",)}, "--methods nonsense: unknown; choose from dense, ours"),
        ({"keep": (0.5,)}, "--macs and --keep given"),
        ({"macs": (1.5,)}, r"--macs 1.5: must lie in \(0, 1\]"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"protocol": "mine"}, "--protocol mine: unknown; choose one of coop, openai, vtab"),
        ({"protocol": "vtab"}, "CLIP_benchmark has no digits"),
        ({"data": "nowhere"}, "unknown"),
        ({"limit": 0}, "--limit 0"),
        ({"files": ("x=y",)}, "--files x=y"),
        ({"macs": (0.01,)}, "macs=0.01"),
    ],
)
def test_mistakes_are_named(config, changes, message):
    with pytest.raises(UserError, match=message):
        main(replace(config, **changes))
    assert not (config.out).exists()


def test_what_a_budget_rules_out_is_said(config, capsys):
    main(replace(config, macs=(0.5,), methods=("ours", "ours-trained")))
    assert "no row for ours-trained at 50 %" in capsys.readouterr().out
    assert {record.method for record in read_records(config.out)} == {"dense", "ours"}


def test_protocols_choose_prompts_and_metric():
    coop, openai = (load_for(name, "digits", None, "test") for name in ("coop", "openai"))
    assert len(coop.templates) == 1 and len(openai.templates) == 2 and coop.images == openai.images
    for name in CATALOG:
        assert PROTOCOLS["coop"].main_metric(name) == "acc1" == PROTOCOLS["vtab"].main_metric(name)
        expected = "mean_per_class_recall" if name in PER_CLASS_SETS else "acc1"
        assert PROTOCOLS["openai"].main_metric(name) == expected
    assert set(VTAB_NAMES) <= set(CATALOG) and set(PER_CLASS_SETS) <= set(CATALOG)


def test_vtab_says_what_to_install(monkeypatch):
    monkeypatch.setattr(protocols.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'patchrank\[bench\]'"):
        protocols._vtab(replace(load_dataset("digits"), name="pets"))


def test_sides_are_plain_arrays(config):
    main(replace(config, methods=("ours",), macs=(0.7,)))
    for record in read_records(config.out):
        sides = read_sides(config.out, record)
        assert sides["ids"].dtype.kind == "U" and sides["correct"].dtype == np.bool_
        assert {len(side) for side in sides.values()} == {12}
