"""Calibration: the small parameters of the frozen tower behind the cut, re-fitted to pruned tokens without labels.

Gains and shifts of the LayerNorms, all biases, and on request low-rank corrections of the linear maps; all are, or are
added to, numbers that the graph already holds, so inference costs and looks the same. A result whose tower differs from
its source in a single bit is `calibrated`.
"""

import copy
from collections.abc import Iterator

from torch import nn

from patchrank.checkpoints.weights import weights_hash
from patchrank.pruned import PrunedTower
from patchrank.tower import VisionTower
from predictors import lora

PARTS = ("norms", "biases")
"""What can be re-fitted; "biases" includes "norms"."""


def behind(tower: VisionTower, layer: int) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of all that acts at block `layer` or later."""
    for name, module in tower.named_modules():
        place = name.split(".")
        if (place[0] == "blocks" and len(place) > 2 and int(place[1]) < layer) or place[0] in ("patch", "norm_pre"):
            continue
        yield name, module


def small_parameters(tower: VisionTower, layer: int, parts: str = "biases") -> dict[str, nn.Parameter]:
    """Parameters by name that calibration may change: those that act at block `layer` or later.

    Args: parts: "norms" (gains and shifts of all LayerNorms) or "biases" (these and the bias of every linear map).
    Raises: ValueError for other parts.
    """
    if parts not in PARTS:
        raise ValueError(f"parts={parts!r}: must be one of {', '.join(PARTS)}")
    found: dict[str, nn.Parameter] = {}
    for name, module in behind(tower, layer):
        if isinstance(module, nn.LayerNorm):
            found |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
        elif parts == "biases" and isinstance(module, nn.Linear) and module.bias is not None:
            found[f"{name}.bias"] = module.bias
    return found


def learnable(found: dict[str, nn.Parameter]) -> nn.ParameterDict:
    """These parameters, to be trained, under names that a module may have."""
    return nn.ParameterDict({name.replace(".", "/"): value.requires_grad_(True) for name, value in found.items()})


def calibratable(
    pruned: PrunedTower, parts: str = "biases", lora_rank: int = 0, seed: int = 0
) -> tuple[PrunedTower, nn.ParameterDict]:
    """A copy whose small parameters behind the first cut can be trained, and these parameters; all else is frozen.

    The given tower keeps its weights; scorer and added tokens are shared with it. With a `lora_rank` the copy's linear
    maps have corrections of that rank, which `lora.absorb` adds to their weights after training.
    """
    layer, tower = pruned.spec.cuts[0][0], copy.deepcopy(pruned.tower).requires_grad_(False)
    small = learnable(small_parameters(tower, layer, parts) | lora.attach(behind(tower, layer), lora_rank, seed))
    for part in (pruned.scorer, pruned.added):
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return PrunedTower(tower, pruned.spec, pruned.scorer, pruned.added, pruned.metric), small


def mode(pruned: PrunedTower, source_hash: str) -> str:
    """Read off, not declared: "frozen" if the tower has the weights that `source_hash` names, else "calibrated"."""
    return "frozen" if weights_hash(pruned.tower) == source_hash else "calibrated"
