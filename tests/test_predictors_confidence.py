"""One factor on the logits and the calibration error, against slow references and cases whose answer is known."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tower
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchrank.pruned import PrunedTower
from patchrank.scorers import SCORERS
from patchrank.spec import PruneSpec
from predictors.cache import Tokens
from predictors.confidence import calibration_error, confidence, refit_factor, said
from predictors.judging import pruned_features
from predictors.prepare import Images


def draw(num: int, num_classes: int, seed: int) -> Tensor:
    return 3 * torch.randn(num, num_classes, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 20.0), st.integers(0, 99))
def test_logits_that_are_too_small_or_large_get_their_factor_back(scale: float, seed: int) -> None:
    dense_nY = draw(20, 5, seed)
    assert refit_factor(dense_nY / scale, dense_nY) == pytest.approx(scale, rel=1e-6)


def test_the_factor_has_the_least_divergence_of_a_fine_grid() -> None:
    dense_nY = draw(200, 7, 0)
    logit_nY = 1.4 * dense_nY + draw(200, 7, 1)

    def divergence(factor: float) -> float:
        pruned, dense = (factor * logit_nY).log_softmax(-1), dense_nY.log_softmax(-1)
        return F.kl_div(pruned, dense, reduction="batchmean", log_target=True).item()

    grid = [0.2 * 1.005**step for step in range(600)]
    assert refit_factor(logit_nY, dense_nY) == pytest.approx(min(grid, key=divergence), rel=5e-3)


def test_unrelated_logits_get_the_smallest_factor() -> None:
    dense_nY = draw(50, 4, 3)
    assert refit_factor(-dense_nY, dense_nY) == pytest.approx(0.01)


def slow_error(logit_nY: Tensor, label_n: Tensor, num_bins: int) -> float:
    """As Guo et al. write it: bin by bin, ((m - 1) / M, m / M]."""
    confidence_n, answer_n = logit_nY.double().softmax(-1).max(-1)
    total = 0.0
    for number in range(num_bins):
        inside = (confidence_n > number / num_bins) & (confidence_n <= (number + 1) / num_bins)
        if inside.any():
            accuracy = (answer_n[inside] == label_n[inside]).double().mean()
            total += inside.sum().item() / len(label_n) * abs(accuracy - confidence_n[inside].mean()).item()
    return total


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(2, 6), st.integers(1, 20), st.integers(0, 99))
def test_the_calibration_error_equals_the_slow_one(num: int, num_classes: int, num_bins: int, seed: int) -> None:
    logit_nY = draw(num, num_classes, seed)
    label_n = torch.randint(num_classes, (num,), generator=torch.Generator().manual_seed(seed + 1))
    found = calibration_error(logit_nY, label_n, num_bins)
    assert found == pytest.approx(slow_error(logit_nY, label_n, num_bins), abs=1e-9)
    assert 0.0 <= found <= 1.0


def test_right_and_sure_costs_nothing_and_wrong_and_sure_everything() -> None:
    logit_nY = 100 * torch.eye(3)
    assert calibration_error(logit_nY, torch.arange(3)) == pytest.approx(0.0, abs=1e-9)
    assert calibration_error(logit_nY, torch.tensor([1, 2, 0])) == pytest.approx(1.0, abs=1e-9)


@torch.no_grad()
def test_the_factor_comes_from_train_images_and_the_errors_from_held_out_ones_with_labels() -> None:
    tower, generator = make_tower(num_layers=3), torch.Generator().manual_seed(0)
    rows_DY = torch.randn(tower.config.feature_dim, 4, generator=generator)

    def tokens(num: int, labels: list[int]) -> Tokens:
        x_nLC = tower.run(tower.embed(torch.randn(num, 3, *tower.config.image_size, generator=generator)), 0, 1)
        return Tokens([str(place) for place in range(num)], x_nLC, tower.finish(x_nLC, 1), torch.tensor(labels))

    images = Images(tokens(9, [-1] * 9), tokens(5, [0, -1, 2, 3, -1]), lambda feature_BD: feature_BD @ rows_DY)
    pruned = PrunedTower(tower, PruneSpec(cuts=((1, 0.5),)), SCORERS["random"](tower.config.grid, 0))
    held_out_nD = pruned_features(pruned, images.held_out, 1)
    found = confidence(pruned, held_out_nD, images)
    few, known = Tokens(*(part[:5] for part in vars(images.train).values())), [0, 2, 3]
    logit_nY = pruned_features(pruned, few, 1) @ rows_DY
    assert found["num_fitted"] == 5 and found["logit_factor"] == refit_factor(logit_nY, few.feature_nD @ rows_DY)
    held_nY = (held_out_nD @ rows_DY)[known]
    labels = torch.tensor([0, 2, 3])
    assert found["ece"] == pytest.approx(slow_error(held_nY, labels, 15), abs=1e-6)
    assert found["ece_refitted"] == pytest.approx(slow_error(found["logit_factor"] * held_nY, labels, 15), abs=1e-6)
    unlabelled = Images(images.train, tokens(2, [-1, -1]), images.classify)
    assert confidence(pruned, held_out_nD[:2], unlabelled).keys() == {"logit_factor", "num_fitted"}
    assert confidence(pruned, held_out_nD, Images(images.train, images.held_out, None)) == {}


def test_the_line_for_the_terminal() -> None:
    found = {"logit_factor": 1.0512, "num_fitted": 8}
    assert said(found) == "logit factor 1.051, fitted without labels on 8 train images"
    errors = {"ece_dense": 0.02, "ece": 0.051, "ece_refitted": 0.033}
    assert said(found | errors).endswith("; calibration error 5.1 -> 3.3 % (unpruned 2.0 %)")
