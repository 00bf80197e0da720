"""`python -m eval golden-match`: the overlap corrected for chance, and the command on a tiny saved model."""

import json

import pytest
import torch
from made_files import make_trained
from test_predictors_train import clip, draw, model  # noqa: F401 (fixtures)

from eval.claims_match import GoldenMatchConfig, corrected_overlap, learned_rankings, main, others_mean
from patchrank.data import load_dataset
from patchrank.errors import UserError
from patchrank.search import search


def test_overlap_is_one_for_equal_sets_and_zero_for_chance():
    order_BN = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(seed)) for seed in range(400)])
    assert corrected_overlap(order_BN[:, :10].flip(1), order_BN[:, :10], 40).eq(1).all()
    by_chance = corrected_overlap(order_BN[:, :10], torch.arange(10).expand(400, -1), 40).mean()
    assert abs(by_chance) < 0.03
    avoided = corrected_overlap(torch.arange(10)[None], torch.arange(10, 20)[None], 40)
    assert avoided.item() == pytest.approx(-(10 / 40) / (1 - 10 / 40))


def test_position_prior_leaves_the_image_out():
    score_IN = torch.tensor([[2.0, 0.0], [0.0, 2.0], [4.0, 2.0]])
    assert others_mean(score_IN).tolist() == [[2.0, 2.0], [3.0, 1.0], [1.0, 1.0]]
    with pytest.raises(UserError, match="fewer than two"):
        others_mean(score_IN[:1])


def test_command(model, clip, tmp_path, capsys):  # noqa: F811
    draw(tmp_path / "data", 4)
    dataset = load_dataset("folder", root=tmp_path / "data", split="all")
    search(clip, dataset, out=tmp_path / "store", rest="drop", layer=1, strategy="sweep")
    make_trained(tmp_path / "own", clip.tower, rest="drop")
    config = GoldenMatchConfig(
        model=str(model), data_root=tmp_path / "data", store=tmp_path / "store", trained=(tmp_path / "own",), keep=0.5,
        batch_size=3, out=tmp_path / "out",
    )  # fmt: skip
    main(config)
    report = json.loads((tmp_path / "out" / "golden_match.json").read_text())
    assert report["num_images"] == 4 and report["chance"] == 0.5 and report["settings"]["strategy"] == "sweep"
    rows = {row["method"]: row for row in report["rows"]}
    assert {"trained: own", "random", "class-attention", "mean-rank"} <= rows.keys()
    assert [name for name, row in rows.items() if row["trained"]] == ["trained: own"]
    assert not any(row["from_rankings"] for row in rows.values())
    assert learned_rankings({"training": {"store": "x"}}) and not learned_rankings({"training": {"store": None}})
    for row in rows.values():
        low, high = row["match_interval"]
        assert -1 <= low <= row["match"] <= high <= 1
        assert row["match"] - row["minus_mean_rank"] == pytest.approx(rows["mean-rank"]["match"])
    assert "match beyond chance" in capsys.readouterr().out
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        main(GoldenMatchConfig(keep=1.0))
