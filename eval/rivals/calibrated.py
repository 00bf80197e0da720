"""A rival after our calibration: the same walk through a tower whose LayerNorms and biases were re-fitted to it.

So that a comparison of calibrated towers compares the walks, not the calibration.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from eval.rivals.budget import Rival
from patchrank.atomic import write_tensors
from patchrank.checkpoints.weights import weights_hash
from patchrank.errors import UserError
from patchrank.tower import VisionTower
from predictors.calibration import small_parameters

_PARTS = "biases"


def parameters_of(rival: Rival) -> dict[str, nn.Parameter]:
    """What calibration re-fits, by name. Raises: UserError for a rival none of whose blocks sees fewer tokens."""
    if rival.first_layer is None:
        raise UserError(f"{type(rival).__name__}: has nothing to calibrate at this budget; choose a lower one")
    return small_parameters(rival.tower, rival.first_layer, _PARTS)


def learnable(rival: Rival) -> nn.ParameterDict:
    """The parameters that calibration re-fits, of the rival's own tower, ready to be trained."""
    found = parameters_of(rival)
    return nn.ParameterDict({name.replace(".", "/"): value.requires_grad_(True) for name, value in found.items()})


def copy_of(tower: VisionTower) -> VisionTower:
    """A tower of its own, frozen: calibration must not touch the given one."""
    return copy.deepcopy(tower).eval().requires_grad_(False)


def file_of(folder: Path, name: str, macs: float) -> Path:
    """Where the calibration of a rival at a budget lies."""
    return folder / f"{name}_{macs:g}.safetensors"


def save(
    folder: Path, name: str, macs: float, parameters: nn.ParameterDict, source_hash: str, trained_on: str = ""
) -> None:
    """Write re-fitted parameters; `source_hash` names the tower's weights before, `trained_on` the images and steps."""
    tensors = {key.replace("/", "."): value for key, value in parameters.items()}
    write_tensors(file_of(folder, name, macs), tensors, {"weights_hash": source_hash, "trained_on": trained_on})


def build(tower: VisionTower, macs: float, *paths: Path, name: str, plain: Callable[..., Rival]) -> Rival:
    """The rival `plain` through a copy of the tower with the parameters that `save` wrote for this budget.

    Args: paths: what `plain` itself needs, then the folder of calibrations.
    Raises: UserError for a file that is absent, damaged or of another tower, or a budget out of reach.
    """
    *own, path = paths
    rival, file = plain(copy_of(tower), macs, *own), file_of(path, name, macs)
    remedy = f"make one: python -m eval.rivals.train --method calibrate --rival {name} --macs"
    if not file.is_file():
        raise UserError(f"{path}: has no calibration of {name} for this budget; {remedy} ...")
    try:
        with safe_open(str(file), "pt") as opened:
            said = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
        if said.get("weights_hash") != weights_hash(tower):
            raise ValueError(f"made for weights {str(said.get('weights_hash'))[:12]}")
        small = parameters_of(rival)
        if tensors.keys() != small.keys():
            raise ValueError("holds other parameters than this walk's")
        with torch.no_grad():
            for key, value in small.items():
                value.copy_(tensors[key])
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: is no calibration of {name} for this tower ({reason}); {remedy} {macs:g}") from error
    rival.trained_on = said.get("trained_on") or None
    return rival
