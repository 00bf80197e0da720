"""Batches, broken pictures and few-shot draws, on folders and tars of a few tiny pictures."""

import contextlib
import io
import os
import random
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchrank.data import BrokenImage, Dataset, Item, batches, few_shot, load_dataset
from patchrank.data.files import FolderFiles, TarFiles
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess

PREPROCESS = Preprocess(image_size=(8, 8), resize=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def encoded(value: int, file_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, file_format)
    return file.getvalue()


def dataset_of(pictures: dict[str, bytes], labels: list[int | None] | None = None) -> Dataset:
    labels = labels or list(range(len(pictures)))
    items = [Item(id, label) for id, label in zip(pictures, labels, strict=True)]
    return Dataset(name="made", split="test", images=items, read=pictures.__getitem__)


def test_batches_are_windows_in_order():
    dataset = dataset_of({f"{value}.png": encoded(value) for value in (0, 51, 102, 153, 204)})
    got = list(batches(dataset, PREPROCESS, 2, start=1, stop=5))
    assert [ids for ids, _, _ in got] == [["51.png", "102.png"], ["153.png", "204.png"]]
    assert [label_B.tolist() for _, _, label_B in got] == [[1, 2], [3, 4]]
    image_BCHW, label_B = got[0][1:]
    assert image_BCHW.dtype == torch.float32 and label_B.dtype == torch.int64
    assert image_BCHW.shape == (2, 3, 8, 8)
    torch.testing.assert_close(image_BCHW[:, 0, 0, 0], torch.tensor([51 / 127.5 - 1, 102 / 127.5 - 1]))


def test_broken_pictures_are_skipped_listed_and_relabel_nobody(caplog):
    pictures = {f"{value}.png": encoded(value) for value in (0, 51, 102, 153, 204, 255)}
    pictures |= {"51.png": b"no picture", "102.png": b"", "153.png": encoded(153)[:50]}
    broken: list[str] = []
    got = list(batches(dataset_of(pictures), PREPROCESS, 2, broken=broken))
    assert broken == ["51.png", "102.png", "153.png"]
    assert [(ids, label_B.tolist()) for ids, _, label_B in got] == [(["0.png"], [0]), (["204.png", "255.png"], [4, 5])]
    assert all(name in caplog.text for name in broken)


def test_unlabelled_pictures_get_minus_one():
    assert next(batches(dataset_of({"a": encoded(3)}, [None]), PREPROCESS, 4))[2].tolist() == [-1]


def test_batch_size_must_be_positive():
    with pytest.raises(UserError, match="batch size 0"):
        next(batches(dataset_of({"a": encoded(3)}), PREPROCESS, 0))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_broken_images_and_nothing_else(file_format, data):
    good = encoded(90, file_format)
    start = data.draw(st.integers(0, len(good) - 1))
    damaged = good[:start] + data.draw(st.binary(max_size=12)) + good[start + data.draw(st.integers(0, 12)) :]
    with contextlib.suppress(BrokenImage):
        assert dataset_of({"x": damaged}).open("x").mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, "TIFF")
    assert dataset_of({"x": file.getvalue()}).open("x").mode == "RGB"


def test_a_file_that_vanished_is_a_broken_image(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(1))
    (tmp_path / "b.png").write_bytes(encoded(2))
    dataset = load_dataset("folder", tmp_path)
    (tmp_path / "a.png").unlink()
    broken: list[str] = []
    assert [ids for ids, _, _ in batches(dataset, PREPROCESS, 8, broken=broken)] == [["b.png"]]
    assert broken == ["a.png"]


def make_tar(path, members: list[tuple[tarfile.TarInfo, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_sees_regular_files_inside_only(tmp_path, tar_format):
    link, device = tarfile.TarInfo("d/link.png"), tarfile.TarInfo("d/device")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/hostname", tarfile.CHRTYPE
    long = "/".join(["n" * 40] * 3) + "/ü.png"
    plain = {"d/a.png": b"first", "d/../d/c.png": b"c", f"d/{long}": b"long", "../out.png": b"x", "/abs.png": b"y"}
    members = [(tarfile.TarInfo(name), data) for name, data in plain.items()]
    make_tar(
        tmp_path / "x.tar", [(link, b""), (device, b""), *members, (tarfile.TarInfo("./d/a.png"), b"again")], tar_format
    )
    files = TarFiles(tmp_path / "x.tar")
    assert files.walk() == ["a.png", "c.png", long]
    assert [files.read(name) for name in files.walk()] == [b"again", b"c", b"long"]
    assert not files.has("link.png")
    with pytest.raises(FileNotFoundError):
        files.read("../out.png")


def test_tar_with_several_top_folders_keeps_their_names(tmp_path):
    make_tar(tmp_path / "x.tar", [(tarfile.TarInfo("a/1.png"), b"1"), (tarfile.TarInfo("b/2.png"), b"2")])
    assert TarFiles(tmp_path / "x.tar").walk() == ["a/1.png", "b/2.png"]
    assert TarFiles(tmp_path / "x.tar").walk("b") == ["b/2.png"]


def test_tar_that_is_none_or_ends_early(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"this is no tar" * 100)
    with pytest.raises(UserError, match=r"x\.tar"):
        TarFiles(path)
    make_tar(path, [(tarfile.TarInfo("a.png"), encoded(5)), (tarfile.TarInfo("b.png"), os.urandom(5000))])
    whole = path.read_bytes()
    path.write_bytes(whole[: 512 * 4])
    with pytest.raises(UserError, match=r"x\.tar"):
        TarFiles(path)


def test_tar_cut_after_indexing_is_a_broken_image(tmp_path):
    path = tmp_path / "x.tar"
    make_tar(path, [(tarfile.TarInfo("a.png"), encoded(5)), (tarfile.TarInfo("b.png"), os.urandom(5000))])
    dataset = load_dataset("folder", path)
    os.truncate(path, 512 * 5)
    dataset.open("a.png")
    with pytest.raises(BrokenImage, match="ends early"):
        dataset.open("b.png")


def test_folder_walk_follows_links_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(b"a")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "real")
    assert FolderFiles(tmp_path / "data").walk() == ["linked/a.png"]


def test_few_shot_draws_as_coop_does():
    """The obvious form of the protocol, with the global generator that CoOp seeds."""
    labels = [2, 0, 2, 1, 0, 2, 2, 0, 1, 2, 2]
    dataset = dataset_of({f"{place}": b"" for place in range(len(labels))}, labels)
    state = random.getstate()
    random.seed(3)
    expected = []
    for label in (2, 0, 1):
        members = [item for item in dataset.images if item.label == label]
        expected += random.sample(members, 3) if len(members) >= 3 else members
    random.setstate(state)
    assert few_shot(dataset, 3, 3).images == expected
    assert few_shot(dataset, 3, 4).images != expected
    assert random.getstate() == state


def test_few_shot_needs_labels_and_a_positive_count():
    with pytest.raises(UserError, match="shots 0"):
        few_shot(dataset_of({"a": b""}), 0, 1)
    with pytest.raises(UserError, match="labels"):
        few_shot(dataset_of({"a": b""}, [None]), 1, 1)
