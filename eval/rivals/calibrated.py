"""A rival after our calibration: the same walk through a tower whose small parameters were re-fitted to it.

So that a comparison of calibrated towers compares the walks, not the calibration.
"""

import copy
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from eval.rivals.budget import Rival
from patchrank.atomic import write_tensors
from patchrank.checkpoints.weights import weights_hash
from patchrank.errors import UserError
from patchrank.tower import VisionTower
from predictors import calibration, lora

_PARTS = "biases"


def learnable(rival: Rival, lora_rank: int = 0, seed: int = 0) -> nn.ParameterDict:
    """The parameters that calibration re-fits, of the rival's own tower, ready to be trained.

    Raises: UserError for a rival none of whose blocks sees fewer tokens.
    """
    if rival.first_layer is None:
        raise UserError(f"{type(rival).__name__}: has nothing to calibrate at this budget; choose a lower one")
    small = calibration.small_parameters(rival.tower, rival.first_layer, _PARTS)
    corrections = lora.attach(calibration.behind(rival.tower, rival.first_layer), lora_rank, seed)
    return calibration.learnable(small | corrections)


def copy_of(tower: VisionTower) -> VisionTower:
    """A tower of its own, frozen: calibration must not touch the given one."""
    return copy.deepcopy(tower).eval().requires_grad_(False)


def file_of(folder: Path, name: str, macs: float) -> Path:
    """Where the calibration of a rival at a budget lies."""
    return folder / f"{name}_{macs:g}.safetensors"


def save(
    folder: Path,
    name: str,
    macs: float,
    parameters: nn.ParameterDict,
    source_hash: str,
    trained_on: str = "",
    lora_rank: int = 0,
) -> None:
    """Write re-fitted parameters; `source_hash` names the tower's weights before, `trained_on` the images and steps."""
    said = {"weights_hash": source_hash, "trained_on": trained_on, "lora_rank": str(lora_rank)}
    tensors = {key.replace("/", "."): value for key, value in parameters.items()}
    write_tensors(file_of(folder, name, macs), tensors, said)


def build(
    tower: VisionTower, macs: float, *paths: Path, name: str, plain: Callable[..., Rival], corrected: bool = False
) -> Rival:
    """The rival `plain` through a copy of the tower with the parameters that `save` wrote for this budget.

    Args: paths: what `plain` itself needs, then the folder of calibrations; corrected: whether low-rank corrections
    belong to it, so that neither kind passes for the other.
    Raises: UserError for a file that is absent, damaged or of another tower, or a budget out of reach.
    """
    *own, path = paths
    rival, file = plain(copy_of(tower), macs, *own), file_of(path, name, macs)
    flags = "--lora-rank 4 " if corrected else ""
    remedy = f"make one: python -m eval.rivals.train --method calibrate {flags}--rival {name} --macs"
    if not file.is_file():
        raise UserError(f"{path}: has no calibration of {name} for this budget; {remedy} ...")
    try:
        with safe_open(str(file), "pt") as opened:
            said = opened.metadata() or {}
            tensors = {key.replace(".", "/"): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        if said.get("weights_hash") != weights_hash(tower):
            raise ValueError(f"made for weights {str(said.get('weights_hash'))[:12]}")
        lora_rank = int(said.get("lora_rank", 0))
        if corrected != (lora_rank > 0):
            raise ValueError(f"was made with --lora-rank {lora_rank}")
        small = learnable(rival, lora_rank).requires_grad_(False)
        if tensors.keys() != small.keys():
            raise ValueError("holds other parameters than this walk's")
        for key, value in small.items():
            value.copy_(tensors[key])
        lora.absorb(rival.tower)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: is no calibration of {name} for this tower ({reason}); {remedy} {macs:g}") from error
    rival.trained_on = said.get("trained_on") or None
    return rival
