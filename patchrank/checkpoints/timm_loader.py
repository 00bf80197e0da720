"""A timm architecture name and a local checkpoint -> `LoadedClip` with the classifier's head as class matrix."""

import difflib
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchrank.checkpoints.loaded import LoadedClip
from patchrank.checkpoints.timm_vit import timm_config, timm_state
from patchrank.checkpoints.weights import Weights, build_tower, read_state_dict, weights_hash
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess
from patchrank.torchvision_shim import ensure_torchvision

_CROP = re.compile(r"resize (\d+), centre crop (\d+)")


def is_timm_name(name: str) -> bool:
    """Whether timm knows an architecture of this name."""
    ensure_torchvision()
    import timm

    return timm.is_model(name)


def _blank_model(arch: str) -> nn.Module:
    """The architecture without head and without memory for weights (device `meta`)."""
    ensure_torchvision()
    import timm

    if not timm.is_model(arch):
        close = difflib.get_close_matches(arch, timm.list_models(), n=5)
        hint = f"did you mean {', '.join(close)}?" if close else "names are listed by timm.list_models()"
        raise UserError(f"{arch!r}: must be an architecture that timm knows; {hint}")
    with torch.device("meta"):
        return timm.create_model(arch, pretrained=False, num_classes=0).eval()


def _three(text: str) -> tuple[float, float, float]:
    values = [float(part) for part in text.replace("[", " ").replace("]", " ").replace(",", " ").split()]
    return tuple(values * 3 if len(values) == 1 else values)


def timm_preprocess(model: nn.Module, metadata: dict[str, str], source: str) -> Preprocess:
    """From the checkpoint's `mean`, `std`, `interpolation` and `crop` metadata, else from timm's configuration."""
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    height, width = config["input_size"][1:]
    mode = {"center": "shortest", "squash": "squash"}.get(config.get("crop_mode", "center"))
    if mode is None:
        raise UserError(f"{source}: crop mode {config['crop_mode']!r} must be 'center' or 'squash'; convert the images")
    resize: int | tuple[int, int] = math.floor(min(height, width) / config["crop_pct"])
    if mode == "squash":
        resize = math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"])
    if "crop" in metadata:
        match = _CROP.fullmatch(metadata["crop"])
        if match is None or (int(match[2]), int(match[2])) != (height, width):
            raise UserError(
                f"{source}: metadata crop {metadata['crop']!r}: must read 'resize R, centre crop {height}'; correct it"
            )
        mode, resize = "shortest", int(match[1])
    return Preprocess(
        image_size=(height, width),
        resize=resize,
        mode=mode,
        interpolation=metadata.get("interpolation", config["interpolation"]),
        mean=_three(metadata["mean"]) if "mean" in metadata else tuple(config["mean"]),
        std=_three(metadata["std"]) if "std" in metadata else tuple(config["std"]),
    )


def _pop_head(state: dict[str, Tensor], width: int, source: str) -> tuple[Tensor, Tensor] | None:
    if "head.weight" not in state:
        return None
    num_classes = state["head.weight"].shape[0]
    head = Weights({name: state.pop(name) for name in ("head.weight", "head.bias") if name in state}, source)
    return head.take("head.weight", num_classes, width).float(), head.take("head.bias", num_classes).float()


def load_timm(arch: str, path: str | Path) -> LoadedClip:
    """Load a timm ViT classifier from a local file; `arch` may be empty if the file's metadata names it ("arch")."""
    state, metadata = read_state_dict(path)
    arch = arch or metadata.get("arch", "")
    if not arch:
        raise UserError(
            f"{path}: its metadata must name the 'arch'; or say which, as in --model timm:vit_tiny_patch16_224@{path}"
        )
    state = {name: tensor.float() for name, tensor in state.items()}
    model = _blank_model(arch)
    config = timm_config(model, head=False, name=arch)
    class_head = _pop_head(state, config.width, str(path))
    weights = Weights(state, str(path))
    ours = timm_state(weights, config, model)
    weights.close()
    tower = build_tower(config, ours, arch)
    return LoadedClip(
        tower=tower,
        preprocess=timm_preprocess(model, metadata, str(path)),
        model_name=arch,
        pretrained=Path(path).name,
        weights_hash=weights_hash(tower),
        class_head=class_head,
    )
