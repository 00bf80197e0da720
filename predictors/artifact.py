"""A trained pruned tower on disk: `patchrank.saving`'s two files, and `training.json` that says how it came about."""

import json
from pathlib import Path
from typing import Any

import torch

from patchrank import saving
from patchrank.atomic import write_json
from patchrank.errors import UserError
from patchrank.pruned import PrunedTower
from predictors.calibration import mode
from predictors.tables import BUILDERS

_TRAINING = "training.json"


def save(folder: Path, pruned: PrunedTower, rows: dict[str, Any], source_hash: str, training: dict[str, Any]) -> str:
    """Write the pruned tower and how it was trained; returns its mode, "frozen" or "calibrated".

    Args: rows: arguments of `patchrank.saving.save_pruned` (scorer, scorer_options, added, added_options, model,
    pretrained); source_hash: weights hash of the tower before any training; training: JSON values.
    """
    saving.save_pruned(folder, pruned, **rows)
    found = mode(pruned, source_hash)
    record = {"mode": found, "source_weights_hash": source_hash, "rows": rows, **training}
    write_json(folder / _TRAINING, record)
    return found


def load_pruned(folder: str | Path, device: str | torch.device = "cpu") -> PrunedTower:
    """Read a saved pruned tower, learned scorers and added tokens included: eval mode, frozen weights.

    Raises: UserError for files that are absent, changed, or of another schema.
    """
    return saving.load_pruned(folder, BUILDERS, device)


def read_training(folder: str | Path) -> dict[str, Any]:
    """What `save` recorded: mode, source_weights_hash, rows, and the training's own entries.

    Raises: UserError for a folder that holds no such record.
    """
    path = Path(folder) / _TRAINING
    try:
        record = json.loads(path.read_text())
        if not {"mode", "source_weights_hash", "rows"} <= record.keys():
            raise ValueError("entries are missing")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give the --out of a finished training") from error
    return record
