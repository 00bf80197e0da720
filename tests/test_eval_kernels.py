"""`python -m eval kernels`: the file it writes, and its refusal of nonsense."""

import json

import pytest

from eval.kernels import KernelsConfig, main
from patchrank.errors import UserError


def test_every_map_of_a_block_is_timed_and_both_kernels_agree(tmp_path, capsys):
    main(KernelsConfig(width=16, rows=32, rounds=2, out=tmp_path))
    found = json.loads((tmp_path / "cpu_kernels.json").read_text())
    assert [row["map"] for row in found["rows"]] == ["qkv", "out", "fc1", "fc2"]
    assert all(row["largest_difference"] < 1e-4 and row["ours_gmac_per_s"] > 0 for row in found["rows"])
    assert {"command", "versions", "threads", "machine"} <= found.keys()
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_nonsense_is_refused(tmp_path):
    with pytest.raises(UserError, match="--rounds 0"):
        main(KernelsConfig(rounds=0, out=tmp_path))
