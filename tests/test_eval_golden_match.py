"""`python -m eval golden-match`: the overlap corrected for chance, and the command on a tiny saved model."""

import json

import pytest
import torch
from made_files import make_trained
from test_predictors_train import clip, draw, model  # noqa: F401 (fixtures)

from eval.claims_match import (
    GOLDEN,
    MEAN_RANK,
    SUPPRESS,
    Found,
    GoldenMatchConfig,
    corrected_overlap,
    learned_rankings,
    main,
    others_mean,
    rows_of,
)
from patchrank.data import batches, load_dataset
from patchrank.errors import UserError
from patchrank.pruned import PrunedTower
from patchrank.salient import SALIENT
from patchrank.scorers import SCORERS
from patchrank.search import search
from patchrank.search.store import open_store
from patchrank.spec import PruneSpec


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


def golden_cosine(clip, dataset, folder) -> float:  # noqa: F811
    """Mean cosine of the walks that keep the first half of the stored orders."""
    store = open_store(folder / "store", weights_hash=clip.weights_hash)
    spec = PruneSpec(cuts=((1, 0.5),), rest="drop", select="topk")
    pruned = PrunedTower(clip.tower, spec, SCORERS["random"](clip.tower.config.grid))
    cosines = []
    with torch.no_grad():
        for ids, image_BCHW, _ in batches(dataset, clip.preprocess, 1):
            score_BN = -store.order_BN[store.index(ids)].argsort(dim=1).float()
            cosines.append(torch.cosine_similarity(pruned(image_BCHW, score_BN), clip.tower(image_BCHW)).item())
    return sum(cosines) / len(cosines)


def found(*cosines: float) -> Found:
    return Found(match_I=torch.zeros(len(cosines)), cosine_I=torch.tensor(cosines, dtype=torch.float64))


def test_headroom_lies_between_the_best_free_row_and_golden():
    given = {
        GOLDEN: found(1.0, 0.8),
        MEAN_RANK: found(0.2, 0.2),
        "centre": found(0.6, 0.4),
        SALIENT: found(0.8, 0.8),
        "trained: own": found(0.7, 0.7),
    }
    rows = {row["method"]: row for row in rows_of(given, {"trained: own"})}
    assert [name for name, row in rows.items() if row["best_free"]] == ["centre"]
    assert rows[GOLDEN]["headroom"] == pytest.approx(1.0) and rows["centre"]["headroom"] == pytest.approx(0.0)
    assert rows["trained: own"]["headroom"] == pytest.approx(0.2 / 0.4) and rows["trained: own"]["from_rankings"]
    low, high = rows["trained: own"]["headroom_interval"]
    assert low == pytest.approx(0.25) and high == pytest.approx(0.75)
    without = rows_of(given | {GOLDEN: found(0.5, 0.5)}, set())
    assert all(row["headroom"] is None and row["headroom_interval"] is None for row in without)


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
    assert {"trained: own", "random", "class-attention", MEAN_RANK, GOLDEN, SUPPRESS, SALIENT} <= rows.keys()
    assert rows[GOLDEN]["match"] == 1.0 and rows[GOLDEN]["cosine"] == pytest.approx(
        golden_cosine(clip, dataset, tmp_path)
    )
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
