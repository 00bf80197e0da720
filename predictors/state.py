"""A run on disk: one safetensors file with weights, optimiser, the step, the log and the settings.

Random draws need no saving: each is a function of seed and step (`patchrank.pretrain.draws`).
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from torch.optim import Optimizer

from patchrank.atomic import write_tensors
from patchrank.errors import UserError


def save_state(
    path: Path, module: nn.Module, optimiser: Optimizer, progress: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Write the whole state, atomically.

    Args: module: all weights, the trained ones among its parameters; progress and settings: JSON values.
    """
    tensors = {f"weight {name}": tensor for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        tensors |= {f"{key} {name}": tensor for key, tensor in optimiser.state.get(parameter, {}).items()}
    metadata = {"progress": json.dumps(progress), "settings": json.dumps(settings, sort_keys=True)}
    write_tensors(path, tensors, metadata)


def load_state(path: Path, module: nn.Module, optimiser: Optimizer, settings: dict[str, Any]) -> dict[str, Any]:
    """Fill module and optimiser from `path` and return the progress that `save_state` was given.

    Raises: UserError for a file that is damaged or that belongs to a run with other settings or another version.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        found, progress = json.loads(metadata["settings"]), json.loads(metadata["progress"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, or choose another --out") from error
    _check(path, found, json.loads(json.dumps(settings)))
    try:
        module.load_state_dict({name[7:]: tensor for name, tensor in tensors.items() if name.startswith("weight ")})
    except RuntimeError:
        raise UserError(f"{path}: holds other tensors than this version; remove it, or choose another --out") from None
    for name, parameter in module.named_parameters():
        own = {key.removesuffix(f" {name}"): tensor for key, tensor in tensors.items() if key.endswith(f" {name}")}
        own.pop("weight")
        if own:
            optimiser.state[parameter] = {
                key: tensor if tensor.ndim == 0 else tensor.to(parameter.device) for key, tensor in own.items()
            }
    return progress


def _check(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
    if names:
        flags = ", ".join(f"--{name.replace('_', '-')} {found.get(name)}" for name in names)
        raise UserError(f"{path.parent}: holds a run with {flags}; give the same flags to go on, or another --out")
