"""Which image tower a checkpoint belongs to that holds a text tower alone: where it was loaded from, and its hash.

So a text tower trained beside a locked image tower can be passed on without weights that are not its maker's to give.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from patchrank.checkpoints.loaded import LoadedClip
from patchrank.errors import UserError

_ASSETS = "$PATCHRANK_ASSETS/"


@dataclass(frozen=True, kw_only=True)
class TowerReference:
    """One image tower, as `load_clip` finds it."""

    model: str = ""
    """Name for `load_clip`; empty where the file alone says it."""
    pretrained: str = ""
    """Tag of `model` where there is no file."""
    file: str = ""
    """File or folder with the weights, `$PATCHRANK_ASSETS/...` where it lies in that folder."""
    weights_hash: str
    """`LoadedClip.weights_hash`: the tower must have exactly these weights."""


def reference_to(model: str, pretrained: str, clip: LoadedClip) -> TowerReference:
    """The reference to `clip`, which `load_clip(model, pretrained)` gave."""
    if model.startswith("timm:"):
        model, _, path = model.partition("@")
        pretrained = path or pretrained
    if Path(model).exists():
        return TowerReference(file=_portable(model), weights_hash=clip.weights_hash)
    if pretrained and Path(pretrained).exists():
        return TowerReference(model=model, file=_portable(pretrained), weights_hash=clip.weights_hash)
    return TowerReference(model=model, pretrained=pretrained, weights_hash=clip.weights_hash)


def _portable(path: str) -> str:
    """The path below $PATCHRANK_ASSETS where it lies there, else as it is."""
    assets = os.environ.get("PATCHRANK_ASSETS")
    if assets and Path(path).resolve().is_relative_to(Path(assets).resolve()):
        return _ASSETS + Path(path).resolve().relative_to(Path(assets).resolve()).as_posix()
    return path


def arguments(reference: TowerReference, folder: Path, given: str = "") -> tuple[str, str]:
    """Arguments of `load_clip` (model, pretrained) that give the tower.

    Args: folder of the checkpoint, where the file is looked for as well; given, the user's --pretrained, which wins.
    Raises: UserError where the file is nowhere.
    """
    if not reference.file and not given:
        return reference.model, reference.pretrained
    path = given or str(_find(reference, folder))
    return (reference.model, path) if reference.model else (path, "")


def _find(reference: TowerReference, folder: Path) -> Path:
    assets = os.environ.get("PATCHRANK_ASSETS")
    recorded, beside = Path(reference.file), folder / Path(reference.file).name
    if reference.file.startswith(_ASSETS):
        recorded = Path(assets or "") / reference.file.removeprefix(_ASSETS) if assets else beside
    for path in (recorded, beside):
        if path.exists():
            return path
    raise UserError(
        f"{folder}: holds a text tower alone; its image tower {reference.file} (hash {reference.weights_hash[:12]}) is "
        "not there; set PATCHRANK_ASSETS, put the file beside the checkpoint, or give it with --pretrained"
    )


def check_tower(reference: TowerReference, clip: LoadedClip, folder: Path) -> None:
    """Raises: UserError if `clip` has other weights than the text tower was trained beside."""
    if clip.weights_hash != reference.weights_hash:
        raise UserError(
            f"{folder}: its text tower belongs to an image tower with hash {reference.weights_hash[:12]}, "
            f"{clip.pretrained or clip.model_name} has {clip.weights_hash[:12]}; give the right file with --pretrained"
        )
