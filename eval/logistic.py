"""The probe's classifier: scikit-learn's logistic regression on standardised features, C chosen on validation.

Letters: I images, D feature, Y classes.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sklearn
import torch
from safetensors import SafetensorError, safe_open
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm import tqdm

from patchrank.atomic import write_tensors
from patchrank.errors import UserError

logger = logging.getLogger(__name__)

ITERATIONS = 1000
"""Source: Radford et al. 2021, appendix A.3."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A fitted probe: logits = (feature - mean) / std @ weight.T + bias, all float64."""

    mean_D: Tensor
    std_D: Tensor
    weight_YD: Tensor
    bias_Y: Tensor
    C: float
    """The inverse of the regularisation that did best on validation."""
    val_acc1: dict[float, float]
    """C -> accuracy on validation."""

    def __call__(self, feature_ID: Tensor) -> Tensor:
        """Features (I, D) as the tower gives them -> logits (I, Y) float64; column = label."""
        return ((feature_ID.double() - self.mean_D) / self.std_D) @ self.weight_YD.T + self.bias_Y


def fit_probe(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], Cs: tuple[float, ...], num_classes: int
) -> Probe:
    """Fit on train for every C, take the best on val (ties: the smallest C), fit again on both together.

    Args: train and val, (feature (I, D) float, label (I,) int64); Cs, each > 0.
    Raises: UserError for fewer than two classes in train, or no picture in val.
    Source: Radford et al. 2021, appendix A.3 (L-BFGS, at most 1,000 iterations, C chosen on validation, final fit on
    train and validation). Deviation: features are standardised with the train split's mean and deviation, and C comes
    from the given list rather than from a binary search.
    """
    if not len(val[1]):
        raise UserError(
            "the validation split: has no picture to choose C on; raise --fit-limit, or --shots to 2 or more"
        )
    mean_D, std_D = _scaling(train[0])
    val_acc1, former = {}, None
    for C in tqdm(sorted(Cs), desc="choose C", disable=None, leave=False):
        former = _fit(_scaled(train[0], mean_D, std_D), train[1].numpy(), C, former)
        answer = former.predict(_scaled(val[0], mean_D, std_D))
        val_acc1[C] = float(np.mean(answer == val[1].numpy()))
    best = max(val_acc1, key=lambda C: (val_acc1[C], -C))
    everything = torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])
    mean_D, std_D = _scaling(everything[0])
    final = _fit(_scaled(everything[0], mean_D, std_D), everything[1].numpy(), best, None)
    return Probe(
        mean_D=mean_D, std_D=std_D, C=best, val_acc1=val_acc1, **_columns(final, num_classes, everything[0].shape[1])
    )


def _scaling(feature_ID: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (D,) float64; a channel that never changes counts as it is."""
    feature_ID = feature_ID.double()
    std_D = feature_ID.std(0, correction=0)
    return feature_ID.mean(0), torch.where(std_D > 1e-12, std_D, torch.ones_like(std_D))


def _scaled(feature_ID: Tensor, mean_D: Tensor, std_D: Tensor) -> np.ndarray:
    return ((feature_ID.double() - mean_D) / std_D).numpy()


def _fit(x_ID: np.ndarray, label_I: np.ndarray, C: float, former: LogisticRegression | None) -> LogisticRegression:
    """One regression, started from the `former` one: the solution does not depend on it, the time does."""
    if len(np.unique(label_I)) < 2:
        raise UserError("the train split: has pictures of fewer than two classes; raise --fit-limit")
    model = LogisticRegression(C=C, max_iter=ITERATIONS, warm_start=True)
    if former is not None:
        model.coef_, model.intercept_ = former.coef_.copy(), former.intercept_.copy()
    return model.fit(x_ID, label_I)


def _columns(model: LogisticRegression, num_classes: int, num_channels: int) -> dict[str, Tensor]:
    """Weights by label; a class without a train picture never wins. Two classes: scikit-learn stores one row."""
    coefficient, intercept = model.coef_, model.intercept_
    if len(model.classes_) == 2:
        coefficient, intercept = (
            np.stack([-coefficient[0], coefficient[0]]) / 2,
            np.stack([-intercept[0], intercept[0]]) / 2,
        )
    weight_YD = torch.zeros(num_classes, num_channels, dtype=torch.float64)
    bias_Y = torch.full((num_classes,), -1e9, dtype=torch.float64)
    label = torch.from_numpy(model.classes_)
    weight_YD[label], bias_Y[label] = torch.from_numpy(coefficient), torch.from_numpy(intercept)
    return {"weight_YD": weight_YD, "bias_Y": bias_Y}


def holdout(label_I: Tensor, share: float, seed: int) -> Tensor:
    """(I,) bool: a seeded share of each class for validation; at least one of a class that has two or more.

    For data sets without a validation split. Raises: ValueError for a share outside (0, 1).
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share={share}: must lie in (0, 1)")
    generator = torch.Generator().manual_seed(seed)
    chosen_I = torch.zeros(len(label_I), dtype=torch.bool)
    for label in label_I.unique().tolist():
        place = torch.nonzero(label_I == label)[:, 0]
        num = max(1, round(share * len(place))) if len(place) > 1 else 0
        chosen_I[place[torch.randperm(len(place), generator=generator)[:num]]] = True
    return chosen_I


def cached_probe(folder: Path | None, request: dict, fit) -> Probe:
    """The probe of a request from `folder`, else `fit()`, which is then kept there; a damaged file is replaced."""
    if folder is None:
        return fit()
    request = request | {"scikit-learn": sklearn.__version__, "iterations": ITERATIONS}
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    path = folder / "probes" / f"{digest[:24]}.safetensors"
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in ("mean_D", "std_D", "weight_YD", "bias_Y")}
            if about["sha256"] == fingerprint(*tensors.values()):
                return Probe(C=about["C"], val_acc1={float(C): acc for C, acc in about["val_acc1"]}, **tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            pass
        logger.warning("%s: damaged; the probe is fitted again", path)
    probe = fit()
    tensors = {name: getattr(probe, name) for name in ("mean_D", "std_D", "weight_YD", "bias_Y")}
    about = {"C": probe.C, "val_acc1": list(probe.val_acc1.items()), "sha256": fingerprint(*tensors.values())}
    write_tensors(path, tensors, {"about": json.dumps(about)})
    return probe


def fingerprint(*tensors: Tensor) -> str:
    """Hex SHA-256 of the values of tensors, in their order."""
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()
