"""atomic.py: whole or absent, whatever goes wrong on the way."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patchrank import atomic


def test_bytes_text_and_json_arrive_and_make_their_folders(tmp_path: Path) -> None:
    atomic.write_bytes(tmp_path / "a" / "b" / "x", b"\x00\x01")
    atomic.write_text(tmp_path / "t", "ä\n")
    atomic.write_json(tmp_path / "j", {"a": [1, None]})
    assert (tmp_path / "a" / "b" / "x").read_bytes() == b"\x00\x01"
    assert (tmp_path / "t").read_bytes() == "ä\n".encode()
    assert json.loads((tmp_path / "j").read_text()) == {"a": [1, None]}
    assert oct((tmp_path / "t").stat().st_mode & 0o777) == "0o644"


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch, step, failure) -> None:
    atomic.write_bytes(tmp_path / "x", b"old")

    def fail(*args):
        raise failure

    monkeypatch.setattr(atomic.os, step, fail)
    with pytest.raises(type(failure)):
        atomic.write_bytes(tmp_path / "x", b"new")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_device_is_an_error_not_a_short_file(tmp_path: Path, monkeypatch) -> None:
    """A real ENOSPC from the kernel: the temporary file is a link to the device that is always full."""

    def onto_the_full_device(dir: Path, prefix: str, suffix: str):
        name = f"{dir}/{prefix}full{suffix}"
        os.symlink("/dev/full", name)
        return os.open(name, os.O_WRONLY), name

    monkeypatch.setattr(atomic.tempfile, "mkstemp", onto_the_full_device)
    with pytest.raises(OSError) as raised:
        atomic.write_bytes(tmp_path / "x", b"new")
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_json_does_not_have_are_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic.write_json(tmp_path / "j", {"cosine": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6).view(2, 3).T, "a": torch.ones(2, requires_grad=True)}
    atomic.write_tensors(tmp_path / "1", tensors, {"k": "v"})
    atomic.write_tensors(tmp_path / "2", dict(reversed(tensors.items())), {"k": "v"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert torch.equal(load_file(tmp_path / "1")["b"], tensors["b"])


def test_sha256_reads_large_files_in_blocks(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 17)
    atomic.write_bytes(tmp_path / "x", data)
    assert atomic.sha256_of(tmp_path / "x") == hashlib.sha256(data).hexdigest()
