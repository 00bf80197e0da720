"""How well a pruned tower keeps the dense one's features and answers, on cached tokens; and rivals beside it.

Letters: n images, D feature, Y classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.classifier import Classifier
from patchrank.pruned import PrunedTower, Scorer
from patchrank.scorers import SCORERS
from patchrank.spec import RESTS, PruneSpec
from patchrank.tower import VisionTower
from predictors.cache import Tokens
from predictors.costs import share_of_macs

_RESAMPLES = 2000


@torch.no_grad()
def pruned_features(pruned: PrunedTower, tokens: Tokens, layer: int, batch_size: int = 32) -> Tensor:
    """Features (n, D) of the true pruned walk from cached tokens before block `layer`."""
    return torch.cat([pruned.forward_from(x_BLC, layer) for x_BLC in tokens.x_nLC.split(batch_size)])


def cosines(feature_nD: Tensor, dense_nD: Tensor) -> Tensor:
    """Cosine of every image's feature to its dense one, (n,) float32."""
    return F.cosine_similarity(feature_nD.float(), dense_nD.float(), dim=-1)


def judge(feature_nD: Tensor, tokens: Tokens, classify: Classifier | None = None) -> dict[str, float]:
    """Cosine, and with a classifier top-1 agreement, KL (nats) from dense to pruned, and accuracy; fractions in [0, 1].

    `distance` is 1 - cosine, the number that training makes small.
    """
    cosine = cosines(feature_nD, tokens.feature_nD).mean().item()
    found = {"distance": 1.0 - cosine, "cosine": cosine}
    if classify is None:
        return found
    dense_nY, pruned_nY = classify(tokens.feature_nD), classify(feature_nD)
    found["agreement"] = (dense_nY.argmax(-1) == pruned_nY.argmax(-1)).float().mean().item()
    found["kl"] = F.kl_div(
        pruned_nY.log_softmax(-1), dense_nY.log_softmax(-1), reduction="batchmean", log_target=True
    ).item()
    known_n = tokens.label_n >= 0
    if known_n.any():
        label_n = tokens.label_n[known_n].to(pruned_nY.device)
        found["acc1"] = (pruned_nY[known_n].argmax(-1) == label_n).float().mean().item()
        found["dense_acc1"] = (dense_nY[known_n].argmax(-1) == label_n).float().mean().item()
    return found


def paired_interval(first_n: Tensor, second_n: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """Mean of first - second over images, and its 95 % bootstrap interval (percentiles of resampled means)."""
    difference_n = (first_n - second_n).double().cpu()
    generator = torch.Generator().manual_seed(seed)
    index_Sn = torch.randint(len(difference_n), (_RESAMPLES, len(difference_n)), generator=generator)
    mean_S = difference_n[index_Sn].mean(1)
    low, high = torch.quantile(mean_S, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return difference_n.mean().item(), low, high


def kendall_tau(score_BN: Tensor, golden_BN: Tensor) -> Tensor:
    """Kendall's tau-a of every image, (B,) in [-1, 1]: pairs in the golden order minus pairs against it."""
    agree_BNN = (score_BN.unsqueeze(2) - score_BN.unsqueeze(1)).sign() * (
        golden_BN.unsqueeze(2) - golden_BN.unsqueeze(1)
    ).sign()
    num_patches = score_BN.shape[1]
    return agree_BNN.float().sum((1, 2)) / (num_patches * (num_patches - 1))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method under one spec, on held-out images."""

    method: str
    rest: str
    select: str
    keep: float
    macs_share: float
    """MACs of the pruned image tower with its scorer over those of the dense one."""
    numbers: dict[str, float]


def rivals(tower: VisionTower) -> dict[str, Scorer]:
    """The scorers that need no training and that this tower can have."""
    names = [name for name in SCORERS if name != "class-attention" or tower.config.num_prefix > 0]
    return {name: SCORERS[name](tower.config.grid) for name in names}


def compare(
    methods: dict[str, Callable[[PruneSpec], PrunedTower]],
    specs: list[PruneSpec],
    tokens: Tokens,
    layer: int,
    classify: Classifier | None,
) -> list[Row]:
    """Every method under every spec, each with fold and with drop."""
    rows = []
    for spec in specs:
        for rest in RESTS:
            for name, build in methods.items():
                pruned = build(replace(spec, rest=rest))
                numbers = judge(pruned_features(pruned, tokens, layer), tokens, classify)
                row = Row(
                    method=name,
                    rest=rest,
                    select=pruned.spec.select,
                    keep=spec.cuts[-1][1],
                    macs_share=share_of_macs(pruned),
                    numbers=numbers,
                )
                rows.append(row)
    return rows


def text_table(rows: list[Row], title: str) -> str:
    """Rows for a terminal, one line per method, one pair of columns (cosine, agreement) per keep and rest."""
    columns = list(dict.fromkeys((row.keep, row.rest) for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    width = max(map(len, [*methods, "method"]))
    cells = {(row.method, row.keep, row.rest): row for row in rows}
    lines = [title, f"{'method':{width}}" + "".join(f"  {f'{rest} {keep:.2f}':>15}" for keep, rest in columns)]
    for method in methods:
        line = f"{method:{width}}"
        for keep, rest in columns:
            numbers = cells[method, keep, rest].numbers
            agreement = f"{100 * numbers['agreement']:6.1f} %" if "agreement" in numbers else " " * 8
            line += f"  {numbers['cosine']:.4f} {agreement}"
        lines.append(line)
    return "\n".join([*lines, "cosine to the unpruned feature, and top-1 agreement with the unpruned tower"])
