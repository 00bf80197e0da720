"""`load_clip`: one name or path -> frozen image tower, its transform, and text encoder or classifier head.

Letters: Y classes, D feature.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.checkpoints.hf_loader import load_hf
from patchrank.checkpoints.loaded import LoadedClip, TextEncoder
from patchrank.checkpoints.open_clip_loader import (
    load_open_clip,
    load_open_clip_folder,
    open_clip_names,
    unknown_model,
)
from patchrank.checkpoints.reference import arguments, reference_to
from patchrank.checkpoints.saved import is_saved_clip, load_embedded, load_saved, save_clip
from patchrank.checkpoints.timm_loader import is_timm_name, load_timm
from patchrank.errors import UserError

__all__ = ["LoadedClip", "TextEncoder", "class_matrix", "load_clip", "reference_to", "save_clip"]


def load_clip(model: str = "embedded", pretrained: str = "", device: str | torch.device = "cpu") -> LoadedClip:
    """Load a frozen image tower in float32, with whatever its features are compared with.

    Args: `model` is one of
    - "embedded": the small CLIP inside this package;
    - an open_clip name, with `pretrained` a local checkpoint file or one of open_clip's tags (a tag that is not in
      open_clip's cache is downloaded by open_clip itself; nothing else here touches a network);
    - a folder: a Hugging Face CLIP or SigLIP model, an open_clip hub export, or what `save_clip` wrote (where that
      refers to its image tower, `pretrained` may say where the tower's file is);
    - a timm ViT name with `pretrained` a local file, or "timm:<name>@<file>": a classifier whose head rows act as the
      class matrix; or just the file, where its metadata names the "arch". A name that both know is open_clip's.
    Raises: UserError, in one line, for a name nobody knows, weights that are absent, unsafe or do not fit in every key
    and shape, and towers that are not supported, by name.
    """
    loaded = _load(model, pretrained, device)
    loaded.tower.to(device)
    if loaded.class_head is not None:
        loaded.class_head = loaded.class_head[0].to(device), loaded.class_head[1].to(device)
    return loaded


def _load(model: str, pretrained: str, device: str | torch.device) -> LoadedClip:
    if model == "embedded":
        return load_embedded(device)
    if model.startswith("timm:"):
        arch, _, path = model.removeprefix("timm:").partition("@")
        return _load_timm(arch, path or pretrained)
    if Path(model).is_dir():
        return _load_folder(Path(model), pretrained, device)
    if Path(model).is_file():
        return _load_own(Path(model), pretrained, device) if is_saved_clip(model) else load_timm("", model)
    if model in open_clip_names():
        return load_open_clip(model, pretrained, device)
    if is_timm_name(model):
        return _load_timm(model, pretrained)
    raise unknown_model(model)


def _load_timm(arch: str, path: str) -> LoadedClip:
    if not path:
        raise UserError(f"model {arch!r}: needs weights; give --pretrained a local checkpoint file of this model")
    return load_timm(arch, path)


def _load_own(path: Path, given: str, device: str | torch.device) -> LoadedClip:
    folder = path if path.is_dir() else path.parent
    return load_saved(path, device, lambda reference: _load(*arguments(reference, folder, given), "cpu"))


def _load_folder(folder: Path, given: str, device: str | torch.device) -> LoadedClip:
    if is_saved_clip(folder):
        return _load_own(folder, given, device)
    if (folder / "config.json").is_file():
        return load_hf(folder, device)
    if (folder / "open_clip_config.json").is_file():
        return load_open_clip_folder(folder, device)
    raise UserError(
        f"{folder}: must hold config.json (Hugging Face), open_clip_config.json or clip.json (save_clip); "
        "give the folder of a model"
    )


def class_matrix(clip: LoadedClip, dataset) -> tuple[Tensor, Tensor | None]:
    """Class directions of a data set: weight (D, Y) float32, one column per class, and bias (Y,) or None.

    With a text encoder: unit columns, each the normalised mean over `dataset.templates` of the unit text features, to
    be compared with *normalised* image features, no bias. With a classifier's head: its rows and bias, for features as
    they are. Source: Radford et al. 2021, section 3.1.4 (prompt ensembling in feature space).
    Raises: UserError if the data set has no class names, the head has another number of classes, or there is neither.
    """
    names = list(dataset.class_names)
    if not names:
        raise UserError(f"data {dataset.name!r}: must have class names for a classifier; use retrieval instead")
    if clip.class_head is not None:
        weight_YD, bias_Y = clip.class_head
        if len(names) != len(weight_YD):
            raise UserError(
                f"data {dataset.name!r}: has {len(names)} classes, the head of {clip.model_name} {len(weight_YD)}; "
                "use the data set it was trained on, or a model with a text tower"
            )
        return weight_YD.T.contiguous(), bias_Y
    if clip.text is None:
        raise UserError(f"model {clip.model_name}: has neither text tower nor classifier head; load the whole model")
    templates = dataset.templates
    text_YTD = clip.text([template.format(name) for name in names for template in templates]).unflatten(
        0, (len(names), len(templates))
    )
    return F.normalize(text_YTD.mean(1), dim=-1).T.contiguous(), None
