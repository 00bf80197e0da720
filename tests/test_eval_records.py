"""Records: what is written is read back, equal subjects are the same measurement, damage and strangers are refused."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from eval.records import (
    CLASSIFICATION,
    Record,
    Subject,
    find_record,
    path_of,
    read_record,
    read_records,
    read_sides,
    text_sha256,
    write_record,
)
from patchrank.errors import UserError

SUBJECT = Subject(
    dataset="digits",
    model="ViT-B/16 big",
    pretrained="weights.safetensors",
    task=CLASSIFICATION,
    method="tome",
    macs=0.7,
    image_macs=69,
    dense_macs=100,
    protocol="coop",
    split="test",
    split_source="drawn",
    split_sha256="a",
    num_images=2,
    images_sha256="b",
    weights_hash="c",
    settings={"recall": [1, 5], "b": 1, "a": 2},
)
RECORD = Record(**asdict(SUBJECT), metrics={"acc1": 0.5, "cosine": 0.9}, main_metric="acc1", versions={"torch": "2"})
SIDES = {"ids": np.array(["x", "yy"]), "correct": np.array([True, False]), "cosine": np.float32([0.8, 1.0])}


def test_a_record_and_its_sides_come_back(tmp_path):
    written = write_record(tmp_path, RECORD, SIDES)
    assert replace(written, side=None, side_sha256=None) == RECORD
    (found,) = read_records(tmp_path)
    assert found == written and found.main == 0.5 and found.macs_share == 0.69 and found.subject == SUBJECT
    sides = read_sides(tmp_path, found)
    assert set(sides) == set(SIDES) and all((sides[name] == SIDES[name]).all() for name in SIDES)
    assert json.loads(path_of(tmp_path, SUBJECT).read_text())["metrics"]["acc1"] == 0.5
    assert read_sides(tmp_path, write_record(tmp_path, RECORD)) == {}


def test_only_an_equal_subject_is_found(tmp_path):
    assert find_record(tmp_path, SUBJECT) is None
    written = write_record(tmp_path, RECORD, SIDES)
    assert find_record(tmp_path, SUBJECT) == written
    assert find_record(tmp_path, replace(SUBJECT, settings={"a": 2, "b": 1, "recall": (1, 5)})) == written
    for changes in ({"images_sha256": "other"}, {"weights_hash": "other"}, {"settings": {}}, {"image_macs": 70}):
        assert replace(SUBJECT, **changes).stem == SUBJECT.stem
        assert find_record(tmp_path, replace(SUBJECT, **changes)) is None
    (tmp_path / written.side).unlink()
    assert find_record(tmp_path, SUBJECT) is None


def test_names_of_files_tell_measurements_apart():
    changes = [{"dataset": "x"}, {"split": "x"}, {"num_images": 9}, {"model": "x"}, {"method": "x"}, {"macs": 0.56}]
    changes += [{"protocol": "x"}, {"keep": 0.7}, {"task": "linear_probe"}, {"pretrained": "x"}, {"method": "dense"}]
    stems = {replace(SUBJECT, **one).stem for one in changes} | {SUBJECT.stem}
    assert len(stems) == len(changes) + 1
    assert all("/" not in stem and " " not in stem for stem in stems)


def test_changed_sides_and_strange_files_are_refused(tmp_path):
    written = write_record(tmp_path, RECORD, SIDES)
    (tmp_path / written.side).write_bytes(b"x")
    with pytest.raises(UserError, match="changed since"):
        read_sides(tmp_path, written)
    path = path_of(tmp_path, SUBJECT)
    for broken in ({"schema": 99}, {"unknown": 1}):
        path.write_text(json.dumps(asdict(RECORD) | broken))
        with pytest.raises(UserError, match="not a record"):
            read_record(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not a record"):
        read_record(path)
    path.write_text('{"rows": []}')
    assert read_records(tmp_path) == []
    with pytest.raises(ValueError, match="main_metric"):
        replace(RECORD, main_metric="acc5")


def test_hashes_depend_on_order_and_content():
    assert len({text_sha256(one) for one in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""])}) == 4
