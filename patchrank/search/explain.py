"""What a picture sheet shows about one image: its ranking, what stays at each keep ratio, the deletion curve.

Letters: N patches, M points of the curve, R random orders, D feature.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchrank.data import Item
from patchrank.search.curves import features_along, free_order, preserved
from patchrank.search.plan import Plan
from patchrank.search.runner import seed_of
from patchrank.search.variants import prepare
from patchrank.tokens import num_keep

NUM_RANDOM = 4
_CURVE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Kept:
    """One keep ratio of the golden order."""

    keep: float
    num_kept: int
    cosine: float
    answer: str | None
    """Predicted class name; None without classes."""
    is_right: bool | None
    """Whether it is the true class; None without a label."""


@dataclass(frozen=True)
class Sheet:
    """All that is drawn about one image."""

    image_id: str
    picture_HWC: np.ndarray
    """What the tower saw, float in [0, 1]."""
    order_N: np.ndarray
    grid: tuple[int, int]
    rest: str
    kept: list[Kept]
    truth: str | None
    dense: Kept
    curve_keep_M: np.ndarray
    golden_M: np.ndarray
    checkerboard_M: np.ndarray
    random_RM: np.ndarray


def _unnormalised(plan: Plan, image_CHW: Tensor) -> np.ndarray:
    mean_C11 = torch.tensor(plan.clip.preprocess.mean)[:, None, None]
    std_C11 = torch.tensor(plan.clip.preprocess.std)[:, None, None]
    return (image_CHW.cpu() * std_C11 + mean_C11).clamp(0, 1).permute(1, 2, 0).numpy()


def make_sheet(plan: Plan, item: Item, golden_N: Tensor, keeps: tuple[float, ...]) -> Sheet:
    """Compute one sheet. Raises: BrokenImage."""
    job, num_patches = plan.job, plan.clip.tower.config.num_patches
    image_CHW = job.image(item).to(job.device)
    with torch.no_grad():
        variants = prepare(job.tower, image_CHW, job.spec)
        seed = seed_of(job.seed, item.id)
        orders = [golden_N.long().to(job.device), free_order(variants, "checkerboard", seed)]
        orders += [free_order(variants, "random", seed + index) for index in range(NUM_RANDOM)]
        ratios = sorted({*_CURVE, *keeps}, reverse=True)
        counts = [num_keep(keep, num_patches) for keep in ratios]
        feature_SMD = features_along(variants, torch.stack(orders), counts)
        cosine_SM = preserved(feature_SMD, variants.dense_D).cpu().numpy()
        at_K = [ratios.index(keep) for keep in keeps]
        answers = _answers(plan, torch.cat([feature_SMD[0, at_K], variants.dense_D[None]]))
    names = plan.dataset.class_names
    kept = [
        Kept(keep, counts[at], float(cosine_SM[0, at]), *_judge(answer, item.label, names))
        for keep, at, answer in zip(keeps, at_K, answers)
    ]
    return Sheet(
        image_id=item.id,
        picture_HWC=_unnormalised(plan, image_CHW),
        order_N=golden_N.numpy().astype(np.int64),
        grid=variants.state.grid,
        rest=job.spec.rest,
        kept=kept,
        truth=names[item.label] if item.label is not None and names else None,
        dense=Kept(1.0, num_patches, 1.0, *_judge(answers[-1], item.label, names)),
        curve_keep_M=np.array(ratios),
        golden_M=cosine_SM[0],
        checkerboard_M=cosine_SM[1],
        random_RM=cosine_SM[2:],
    )


def _answers(plan: Plan, feature_BD: Tensor) -> list[int | None]:
    if plan.job.logits is None:
        return [None] * len(feature_BD)
    return plan.job.logits(feature_BD).argmax(-1).tolist()


def _judge(answer: int | None, label: int | None, names: list[str]) -> tuple[str | None, bool | None]:
    if answer is None:
        return None, None
    name = names[answer] if answer < len(names) else f"class {answer}"
    return name, None if label is None else answer == label
