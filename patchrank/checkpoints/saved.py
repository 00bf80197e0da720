"""CLIPs of our own making: one safetensors file with both towers, one JSON manifest beside it.

The embedded default (`patchrank/assets`) is such a pair. Weights are stored in float16 and loaded in float32. Where
the image tower is somebody else's, the file holds the text tower alone and the manifest refers to the image tower.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchrank.atomic import sha256_of, write_json, write_tensors
from patchrank.checkpoints.loaded import LoadedClip
from patchrank.checkpoints.reference import TowerReference, check_tower
from patchrank.checkpoints.weights import Weights, read_state_dict, weights_hash
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess
from patchrank.text import TextConfig, TextTower
from patchrank.text_encoders import OwnText
from patchrank.tower import TowerConfig, VisionTower

SCHEMA, SCHEMA_REFERENCE = 1, 2
"""Of a manifest with both towers, and of one that refers to its image tower."""
_KIND = "patchrank clip"


def _paths(path: str | Path) -> tuple[Path, Path]:
    """Weights and manifest: `x.safetensors` and `x.json`, or `clip.*` inside a folder."""
    path = Path(path)
    weights = path if path.suffix == ".safetensors" else path / "clip.safetensors"
    return weights, weights.with_suffix(".json")


def is_saved_clip(path: str | Path) -> bool:
    """Whether `save_clip` wrote this folder or this safetensors file."""
    weights, manifest = _paths(path)
    if not weights.is_file() or not manifest.is_file():
        return False
    try:
        return json.loads(manifest.read_text()).get("kind") == _KIND
    except (ValueError, AttributeError):
        return False


def save_clip(
    path: str | Path,
    tower: VisionTower | TowerReference,
    text_tower: TextTower,
    preprocess: Preprocess,
    logit_scale: float,
    *,
    name: str,
    dtype: torch.dtype = torch.float16,
    recipe: dict[str, Any] | None = None,
) -> None:
    """Write both towers to a folder or to `*.safetensors`, with a manifest of everything that loading needs.

    Args: `tower` a reference where its weights are not to be stored; `logit_scale` the factor itself, not its
    logarithm; `dtype` of the stored tensors; `recipe` JSON values that say how the weights were made. The weights are
    written before the manifest that holds their checksum.
    """
    weights_path, manifest_path = _paths(path)
    referred = isinstance(tower, TowerReference)
    modules = {"text": text_tower} if referred else {"image": tower, "text": text_tower}
    tensors = {
        f"{prefix}.{key}": tensor.to(dtype)
        for prefix, module in modules.items()
        for key, tensor in module.state_dict().items()
    }
    write_tensors(weights_path, tensors)
    manifest = {
        "schema": SCHEMA_REFERENCE if referred else SCHEMA,
        "kind": _KIND,
        "name": name,
        **({"image_tower": asdict(tower)} if referred else {"tower": asdict(tower.config)}),
        "text": asdict(text_tower.config),
        "preprocess": preprocess.to_dict(),
        "logit_scale": float(logit_scale),
        "sha256": sha256_of(weights_path),
        "recipe": recipe or {},
    }
    write_json(manifest_path, manifest)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a manifest ({error}); save the model again") from error
    if manifest.get("kind") != _KIND or manifest.get("schema") not in (SCHEMA, SCHEMA_REFERENCE):
        raise UserError(
            f"{path}: kind {manifest.get('kind')!r}, schema {manifest.get('schema')!r}: "
            f"must be {_KIND!r}, {SCHEMA} or {SCHEMA_REFERENCE}; save the model again with this version"
        )
    return manifest


def _fill(module: nn.Module, weights: Weights, prefix: str) -> nn.Module:
    state = {key: weights.take(f"{prefix}.{key}", *tensor.shape) for key, tensor in module.state_dict().items()}
    module.load_state_dict(state)
    return module.float().eval().requires_grad_(False)


LoadTower = Callable[[TowerReference], LoadedClip]
"""How the image tower comes that a checkpoint refers to (`patchrank.loading`)."""


def load_saved(path: str | Path, device: str | torch.device = "cpu", load_tower: LoadTower | None = None) -> LoadedClip:
    """Load what `save_clip` wrote, in float32.

    Raises: UserError for a checksum, schema, key or shape that does not fit, or another image tower than referred to.
    """
    weights_path, manifest_path = _paths(path)
    manifest = _read_manifest(manifest_path)
    if not weights_path.is_file() or sha256_of(weights_path) != manifest["sha256"]:
        raise UserError(f"{weights_path}: must have the checksum in {manifest_path.name}; copy both files again")
    weights = Weights(read_state_dict(weights_path)[0], str(weights_path))
    text = _fill(TextTower(TextConfig(**manifest["text"])), weights, "text")
    if manifest["schema"] == SCHEMA:
        tower_config = manifest["tower"] | {"image_size": tuple(manifest["tower"]["image_size"])}
        tower = _fill(VisionTower(TowerConfig(**tower_config)), weights, "image")
        pretrained = weights_path.name
    else:
        tower = _referred(manifest, weights_path.parent, load_tower)
        # the image tower's hash does not tell text towers beside it apart
        pretrained = f"{weights_path.stem}-{manifest['sha256'][:8]}{weights_path.suffix}"
    weights.close()
    return LoadedClip(
        tower=tower,
        preprocess=Preprocess.from_dict(manifest["preprocess"]),
        model_name=manifest["name"],
        pretrained=pretrained,
        weights_hash=weights_hash(tower),
        text=OwnText(text.to(device), manifest["logit_scale"]),
    )


def _referred(manifest: dict[str, Any], folder: Path, load_tower: LoadTower | None) -> VisionTower:
    if load_tower is None:
        raise UserError(f"{folder}: holds a text tower alone; load it with patchrank.loading.load_clip")
    reference = TowerReference(**manifest["image_tower"])
    found = load_tower(reference)
    check_tower(reference, found, folder)
    return found.tower


def load_embedded(device: str | torch.device = "cpu") -> LoadedClip:
    """The small CLIP inside the package. Raises: UserError if the installation lacks it."""
    path = Path(str(files("patchrank"))) / "assets" / "embedded.safetensors"
    if not is_saved_clip(path):
        raise UserError(f"{path}: the embedded model must be there; install patchrank again")
    return load_saved(path, device)
