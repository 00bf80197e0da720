"""`python -m eval kernels`: the file it writes, and its refusal of nonsense."""

import json

import pytest

from eval.kernels import KernelsConfig, main
from patchrank.errors import UserError


def test_every_map_of_a_block_is_timed_and_both_kernels_agree(tmp_path, capsys):
    main(KernelsConfig(width=16, rows=32, tokens=16, head_width=8, rounds=2, out=tmp_path))
    found = json.loads((tmp_path / "cpu_kernels.json").read_text())
    assert [row["map"] for row in found["rows"]] == ["qkv", "out", "fc1", "fc2", "attention"]
    bounds = {"attention": 3e-2}
    assert all(row["largest_difference"] < bounds.get(row["map"], 1e-4) for row in found["rows"])
    assert all(row["ours_gmac_per_s"] > 0 for row in found["rows"])
    assert {"command", "versions", "threads", "machine"} <= found.keys()
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_nonsense_is_refused(tmp_path):
    with pytest.raises(UserError, match="--rounds 0"):
        main(KernelsConfig(rounds=0, out=tmp_path))


def test_sizes_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(UserError, match="--rows 30"):
        main(KernelsConfig(rows=30, tokens=16, out=tmp_path))
