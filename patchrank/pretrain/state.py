"""The state of a run on disk: one safetensors file with weights, teacher, optimiser, progress and settings.

Weights of a locked tower are its checkpoint's and are not repeated.
Random draws need no saving: each is a function of seed and step (`patchrank.pretrain.draws`).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from patchrank.atomic import write_tensors
from patchrank.errors import UserError
from patchrank.pretrain.curriculum import Pace


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Steps done: the sampler's place as well."""
    seconds: float = 0.0
    """Wall time of training so far, pauses left out."""
    cpu_seconds: float = 0.0
    """Processor time of it, all threads."""
    pace: Pace = field(default_factory=Pace)


def save_state(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress, settings: dict[str, Any]
) -> None:
    """Write the whole state, atomically; `settings` are JSON values."""
    locked = _locked(model)
    tensors = {f"model {name}": tensor for name, tensor in model.state_dict().items() if name not in locked}
    for name, parameter in model.named_parameters():
        for key, tensor in optimiser.state.get(parameter, {}).items():
            tensors[f"{key} {name}"] = tensor
    metadata = {"progress": json.dumps(asdict(progress)), "settings": json.dumps(settings, sort_keys=True)}
    write_tensors(path, tensors, metadata)


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of the run whose state is `path`. Raises: UserError for a file that is broken."""
    with _opened(path) as file:
        return json.loads(file.metadata()["settings"])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A state's file. Raises: UserError where it cannot be read."""
    try:
        with safe_open(str(path), "pt") as file:
            if not {"settings", "progress"} <= set(file.metadata() or {}):
                raise UserError(f"{path}: is no state of a run; remove it, or choose another --out")
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, or choose another --out") from error


def load_state(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, settings: dict[str, Any]) -> Progress:
    """Fill model and optimiser from `path` and return how far that run is.

    Raises: UserError for a file that is broken or that belongs to a run with other settings.
    """
    with _opened(path) as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    _check(path, json.loads(metadata["settings"]), settings)
    found = {name.removeprefix("model "): tensor for name, tensor in tensors.items() if name.startswith("model ")}
    wanted = model.state_dict().keys() - _locked(model)
    if found.keys() != wanted:
        name = sorted(found.keys() ^ wanted)[0]
        raise UserError(f"{path}: was written by another version (at {name}); remove it, or choose another --out")
    model.load_state_dict(found, strict=False)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        key, _, parameter = name.partition(" ")
        if key != "model":
            place = parameters[parameter]
            optimiser.state[place][key] = tensor if tensor.ndim == 0 else tensor.to(place.device)
    progress = json.loads(metadata["progress"])
    return Progress(**(progress | {"pace": Pace(**progress["pace"])}))


def _locked(model: nn.Module) -> set[str]:
    """Names of the weights of a locked image tower."""
    pair = getattr(model, "pair", model)
    if any(parameter.requires_grad for parameter in pair.tower.parameters()):
        return set()
    prefix = "pair." if pair is not model else ""
    return {f"{prefix}tower.{name}" for name in pair.tower.state_dict()}


def _check(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    names = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
    if names:
        words = {"pictures": "other pictures", "processes": f"{found.get('processes')} processes"}
        flags = ", ".join(words.get(name) or f"--{name.replace('_', '-')} {found.get(name)}" for name in names)
        raise UserError(f"{path.parent}: holds a run with {flags}; give the same flags to go on, or another --out")
