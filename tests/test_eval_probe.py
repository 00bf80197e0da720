"""`python -m eval probe`: scikit-learn's classifier, C from validation, dense weights for pruned towers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from eval import logistic, probe
from eval.logistic import cached_probe, fingerprint, fit_probe, holdout
from eval.probe import ProbeConfig, fit_images, main, note_of
from eval.records import read_records, read_sides
from patchrank.data import load_dataset
from patchrank.errors import UserError


def blobs(num: int, seed: int, num_classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label_I = torch.arange(num) % num_classes
    centre_YD = torch.tensor([[0.0, 0, 5], [2, 0, 5], [0, 2, 5], [2, 2, 5]])[:num_classes]
    return centre_YD[label_I] + torch.randn(num, 3, generator=generator), label_I


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_probe_is_scikit_learns_with_the_best_C(num_classes):
    train, val, test = (blobs(num, seed, num_classes) for seed, num in enumerate((60, 40, 50)))
    Cs = (1e-3, 1e-1, 10.0)
    found = fit_probe(train, val, Cs, num_classes)
    accuracy = {}
    for C in Cs:
        scaler = StandardScaler().fit(train[0].double())
        model = LogisticRegression(C=C, max_iter=1000).fit(scaler.transform(train[0].double()), train[1])
        accuracy[C] = model.score(scaler.transform(val[0].double()), val[1])
    assert found.val_acc1 == pytest.approx(accuracy)
    assert accuracy[found.C] == max(accuracy.values())
    both = torch.cat([train[0], val[0]]).double(), torch.cat([train[1], val[1]])
    scaler = StandardScaler().fit(both[0])
    model = LogisticRegression(C=found.C, max_iter=1000).fit(scaler.transform(both[0]), both[1])
    expected = model.predict_proba(scaler.transform(test[0].double()))
    np.testing.assert_allclose(found(test[0]).softmax(-1).numpy(), expected, atol=1e-3)


def test_ties_take_the_smallest_C_and_absent_classes_never_win():
    train = torch.tensor([[-1.0], [-1.1], [1.0], [1.1]]), torch.tensor([1, 1, 4, 4])
    found = fit_probe(train, train, (1.0, 0.1, 10.0), 6)
    assert found.C == 0.1 and found.val_acc1[10.0] == 1.0
    assert note_of(found).startswith("C = 0.1, chosen on validation (top-1 1.0000); the list ends there")
    assert "ends" not in note_of(replace(found, C=1.0)) and "ends" not in note_of(replace(found, val_acc1={0.1: 1.0}))
    assert found(torch.tensor([[-2.0], [2.0]])).argmax(-1).tolist() == [1, 4]
    with pytest.raises(UserError, match="fewer than two classes"):
        fit_probe((train[0], torch.ones(4, dtype=torch.int64)), train, (1.0,), 6)


def test_a_channel_that_never_changes_does_no_harm():
    train = blobs(30, 0)
    train = torch.cat([train[0], torch.full((30, 1), 7.0)], dim=1), train[1]
    assert torch.isfinite(fit_probe(train, train, (1.0,), 3)(train[0])).all()


def test_holdout_is_a_seeded_share_of_each_class():
    label_I = torch.tensor([0] * 10 + [1] * 5 + [2] * 2 + [3])
    held_I = holdout(label_I, 0.2, seed=1)
    assert [int(held_I[label_I == label].sum()) for label in range(4)] == [2, 1, 1, 0]
    assert torch.equal(held_I, holdout(label_I, 0.2, seed=1))
    assert not torch.equal(held_I, holdout(label_I, 0.2, seed=2))
    with pytest.raises(ValueError, match="share"):
        holdout(label_I, 1.0, 0)


def test_a_fitted_probe_is_kept_and_checked(tmp_path, caplog):
    train, calls = blobs(30, 0), []

    def fit():
        calls.append(1)
        return fit_probe(train, train, (0.1, 1.0), 3)

    request = {"features": fingerprint(*train)}
    first = cached_probe(tmp_path, request, fit)
    again = cached_probe(tmp_path, request, fit)
    assert len(calls) == 1 and again.C == first.C and again.val_acc1 == first.val_acc1
    assert torch.equal(again(train[0]), first(train[0]))
    (path,) = (tmp_path / "probes").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    cached_probe(tmp_path, request, fit)
    assert len(calls) == 2 and "damaged" in caplog.text
    cached_probe(tmp_path, request | {"seed": 1}, fit)
    cached_probe(None, request, fit)
    assert len(calls) == 4


@pytest.fixture(scope="module")
def train():
    full = load_dataset("digits", split="train")
    return replace(full, images=full.images[:60])


@pytest.fixture
def config(model, train, tmp_path, monkeypatch) -> ProbeConfig:
    real = probe.load_dataset
    short = lambda name, root=None, split="test": train if split == "train" else real(name, root, split)  # noqa: E731
    monkeypatch.setattr(probe, "load_dataset", short)
    shared = dict(threads=1, cache=tmp_path / "cache", out=tmp_path / "out")
    return ProbeConfig(model=str(model), limit=20, fit_limit=40, macs=(0.6,), Cs=(0.01, 0.1), **shared)


def test_dense_weights_answer_for_pruned_towers(config, monkeypatch, capsys):
    fits = []
    real = logistic.fit_probe
    monkeypatch.setattr(probe, "fit_probe", lambda *args: fits.append(1) or real(*args))
    main(config)
    assert len(fits) == 1, "one fit, on dense features"
    records = read_records(config.out)
    assert {record.protocol for record in records} == {"probe-dense"}
    assert {record.settings["num_fit_images"] for record in records} == {40}
    for record in records:
        assert record.metrics["acc1"] == pytest.approx(read_sides(config.out, record)["correct"].mean())
        assert record.note.startswith("C = ") and record.task == "linear_probe"
    assert "chosen on validation" in capsys.readouterr().out
    main(replace(config, fit="own"))
    assert len(fits) == 2, "the dense fit comes from the cache, the other method has its own"
    own = [record for record in read_records(config.out) if record.protocol == "probe-own"]
    assert [record.method for record in own] == ["dense", "ours"]
    dense = {record.protocol: record for record in read_records(config.out) if record.method == "dense"}
    assert dense["probe-own"].metrics == dense["probe-dense"].metrics


def test_no_test_image_is_fitted_and_val_is_not_both(config):
    images = fit_images(config, "digits")
    fitted = {item.id for part in (images.train, images.val) for item in part.images}
    assert len(fitted) == 40 and not fitted & {item.id for item in load_dataset("digits").images}
    judged_on_val = fit_images(replace(config, split="val"), "digits")
    assert judged_on_val.val is None and len(judged_on_val.train.images) == 40
    few = fit_images(replace(config, shots=2, fit_limit=None), "digits")
    assert few.val is None and len(few.train.images) == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fit": "both"}, "--fit both"),
        ({"split": "train"}, "--split train: is what the probe is fitted on"),
        ({"shots": 1, "fit_limit": None}, "no picture to choose C on"),
        ({"Cs": ()}, "--Cs"),
        ({"Cs": (0.0,)}, "--Cs 0.0"),
        ({"main": "acc9"}, "--main acc9"),
        ({"val_share": 1.0}, "--val-share 1"),
        ({"fit_limit": 0}, "--fit-limit 0"),
        ({"data": "nowhere"}, "--data nowhere: unknown"),
        ({"data": "digits-pairs"}, "no train split"),
    ],
)
def test_mistakes_are_named(config, changes, message):
    with pytest.raises(UserError, match=message):
        main(replace(config, **changes))
