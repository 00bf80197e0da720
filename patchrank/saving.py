"""A `PrunedTower` on disk: one safetensors file with every weight, one JSON manifest that says what they are.

The manifest names rows of a scorer table, never import paths; whoever loads passes the table. So the core can load
learned scorers without importing the package that defines them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchrank.atomic import sha256_of, write_json, write_tensors
from patchrank.checkpoints.weights import Weights, read_state_dict, weights_hash
from patchrank.errors import UserError
from patchrank.provenance import versions
from patchrank.pruned import PrunedTower
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig, VisionTower

SCHEMA = 1
_KIND = "patchrank pruned tower"
_WEIGHTS, _MANIFEST = "pruned.safetensors", "pruned.json"

Builders = Mapping[str, Callable[..., Any]]
"""Row name -> builder (grid, **options) -> scorer, or module of added tokens."""


def _tensors(prefix: str, part: object) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in part.state_dict().items()} if isinstance(part, nn.Module) else {}


def save_pruned(
    folder: str | Path,
    pruned: PrunedTower,
    *,
    scorer: str,
    scorer_options: dict[str, Any] | None = None,
    added: str | None = None,
    added_options: dict[str, Any] | None = None,
    model: str = "",
    pretrained: str = "",
) -> None:
    """Write `pruned.safetensors`, then `pruned.json` with its checksum, each atomically.

    Args: scorer and added are the table rows that rebuild `pruned.scorer` and `pruned.added`, with JSON-able options;
    their weights are stored too. model and pretrained are kept for the reader.
    Raises: UserError where a module of added tokens has no row, or a row no module.
    """
    if (pruned.added is None) != (added is None):
        raise UserError(
            f"added={added!r}: the tower has {'no' if pruned.added is None else 'an'} added part; name its row"
        )
    folder = Path(folder)
    parts = {"tower": pruned.tower, "scorer": pruned.scorer, "added": pruned.added}
    tensors = {name: value for prefix, part in parts.items() for name, value in _tensors(prefix, part).items()}
    write_tensors(folder / _WEIGHTS, tensors)
    manifest = {
        "schema": SCHEMA,
        "kind": _KIND,
        "backbone": {
            "model": model,
            "pretrained": pretrained,
            "config": asdict(pruned.config),
            "weights_hash": weights_hash(pruned.tower),
        },
        "spec": pruned.spec.to_dict(),
        "scorer": {"row": scorer, "options": scorer_options or {}},
        "added": None if added is None else {"row": added, "options": added_options or {}},
        "sha256": sha256_of(folder / _WEIGHTS),
        "versions": versions(),
    }
    write_json(folder / _MANIFEST, manifest)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
        kind, schema = manifest.get("kind"), manifest.get("schema")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as a manifest ({error}); save the pruned tower again") from error
    if kind != _KIND or schema != SCHEMA:
        raise UserError(f"{path}: kind {kind!r}, schema {schema!r}: must be {_KIND!r}, {SCHEMA}; save it again")
    return manifest


def _take_all(weights: Weights, prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """This module's tensors out of the file, each with the shape that the module has."""
    return {key: weights.take(f"{prefix}.{key}", *value.shape) for key, value in module.state_dict().items()}


def _build(part: dict[str, Any], builders: Builders, config: TowerConfig, weights: Weights, prefix: str) -> Any:
    """One table row with its options and its stored weights."""
    row, options = part.get("row"), part.get("options")
    if row not in builders:
        raise UserError(f"{prefix} {row!r}: must be a row of the given table; known: {', '.join(sorted(builders))}")
    try:
        built = builders[row](config.grid, **options)
    except TypeError as error:
        raise UserError(f"{prefix} {row!r}: options {options} do not fit ({error}); save the tower again") from error
    if isinstance(built, nn.Module):
        built.load_state_dict(_take_all(weights, prefix, built))
        built.requires_grad_(False)
    return built


def load_pruned(folder: str | Path, builders: Builders, device: str | torch.device = "cpu") -> PrunedTower:
    """Read what `save_pruned` wrote: the same tower, in eval mode, with frozen weights.

    Args: builders, the table of scorers (`patchrank.scorers.SCORERS`, or a larger one with learned rows).
    Raises: UserError for a file that is absent, changed or of another schema, for a row that the table lacks, and for
    tensors missing, left over or of another shape.
    """
    manifest_path, path = Path(folder) / _MANIFEST, Path(folder) / _WEIGHTS
    manifest = _read_manifest(manifest_path)
    try:
        checksum, backbone, parts = manifest["sha256"], manifest["backbone"], (manifest["scorer"], manifest["added"])
        fields, expected_hash = backbone["config"], backbone["weights_hash"]
        config = TowerConfig(**(fields | {"image_size": tuple(fields["image_size"])}))
        spec = PruneSpec.from_dict(manifest["spec"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{manifest_path}: does not fit this version ({error}); save the tower again") from error
    if not path.is_file() or sha256_of(path) != checksum:
        raise UserError(f"{path}: must have the checksum that {_MANIFEST} names; copy both files again")
    weights = Weights(read_state_dict(path)[0], str(path))
    with torch.device("meta"):
        tower = VisionTower(config)
    tower.load_state_dict(_take_all(weights, "tower", tower), assign=True)
    if weights_hash(tower) != expected_hash:
        raise UserError(
            f"{path}: must hold the weights {expected_hash[:12]} that {_MANIFEST} names; copy both files again"
        )
    scorer = _build(parts[0], builders, config, weights, "scorer")
    added = None if parts[1] is None else _build(parts[1], builders, config, weights, "added")
    weights.close()
    pruned = PrunedTower(tower.requires_grad_(False), spec, scorer, added)
    return pruned.to(device).eval()
