"""An open_clip name with a tag or a local checkpoint, or a folder that open_clip saved -> `LoadedClip`."""

import difflib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from patchrank.checkpoints.loaded import LoadedClip
from patchrank.checkpoints.open_clip_vit import open_clip_config, tower_from_open_clip
from patchrank.checkpoints.weights import Weights, read_state_dict, weights_hash
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess
from patchrank.text_encoders import OpenClipText
from patchrank.torchvision_shim import ensure_torchvision
from patchrank.tower import TowerConfig

_LIST_MODELS = 'python -c "import patchrank, open_clip; print(open_clip.list_models())"'
# Numbers that OpenAI's archives store beside the weights, and a counter of old text towers.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "text.transformer.embeddings.position_ids")
# Stands in where only the image tower is looked at: some text towers would ask the hub for their configuration.
_SMALL_TEXT = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
_FOLDER_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def open_clip_names() -> list[str]:
    """Every architecture that the installed open_clip knows."""
    ensure_torchvision()
    import open_clip

    return open_clip.list_models()


def unknown_model(name: str) -> UserError:
    """The error for a name that nothing knows, with the names closest to it."""
    close = difflib.get_close_matches(name, open_clip_names(), n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return UserError(
        f"model {name!r}: must be 'embedded', an open_clip or timm name, a checkpoint file or a folder; "
        f"{hint}all names: {_LIST_MODELS}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warnings that a model starts with random weights: we fill it, or only look at its shape."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _create(name: str, pretrained: str | None, device: str = "cpu", **overrides) -> nn.Module:
    import open_clip

    load_weights = pretrained is not None
    options = {"pretrained": pretrained, "load_weights": load_weights, "pretrained_text": False, "device": device}
    try:
        with _quiet():
            return open_clip.create_model(name, **options, **overrides)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        what = f"weights {pretrained!r}" if pretrained else "architecture"
        raise UserError(
            f"{name}: open_clip cannot get its {what} ({reason}); give --pretrained a local checkpoint file"
        ) from error


def named_config(name: str) -> TowerConfig:
    """Our configuration of an open_clip architecture by name, without memory for weights.

    Raises: UserError for an unknown name or an unsupported tower.
    """
    if name not in open_clip_names():
        raise unknown_model(name)
    with torch.device("meta"):
        model = _create(name, None, device="meta", text_cfg=_SMALL_TEXT)
    return open_clip_config(model.visual, name=name)


def _fill(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a whole checkpoint into an open_clip model; every key and shape must fit."""
    from open_clip.model import convert_to_custom_text_state_dict

    state = {key: tensor for key, tensor in state.items() if key not in _NOT_WEIGHTS}
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    weights = Weights(state, source)
    filled = {}
    for key, tensor in model.state_dict().items():
        # Some trainers store the two scalars with one dimension, some without.
        shape = weights.shape(key) if key in ("logit_scale", "logit_bias") else None
        scalar = shape is not None and shape.numel() == 1
        filled[key] = weights.take(key, *shape).reshape(tensor.shape) if scalar else weights.take(key, *tensor.shape)
    weights.close()
    model.load_state_dict(filled)


def _check_tag(name: str, tag: str) -> None:
    """Refuse an unknown tag, and one whose GELU is not the architecture's (open_clip only warns)."""
    import open_clip
    from open_clip.factory import get_model_config

    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise UserError(
            f"pretrained {tag!r}: must be a local checkpoint file or one of open_clip's tags for {name}: "
            f"{', '.join(tags) or 'none'}"
        )
    quick_tag = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    quick_model = bool(get_model_config(name).get("quick_gelu", False))
    if quick_tag != quick_model:
        other = f"{name}-quickgelu" if quick_tag else name.removesuffix("-quickgelu")
        kind = "quick GELU" if quick_tag else "GELU"
        raise UserError(f"pretrained {tag!r}: was trained with {kind}, {name} has the other; use --model {other}")


def open_clip_preprocess(visual: nn.Module, name: str) -> Preprocess:
    """The transform that open_clip attached to its image tower."""
    config = visual.preprocess_cfg
    if config["resize_mode"] not in ("shortest", "squash"):
        raise UserError(f"{name}: resize mode {config['resize_mode']!r}: must be shortest or squash; use another model")
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    square = height == width and config["resize_mode"] == "shortest"
    return Preprocess(
        image_size=(height, width),
        resize=height if square else (height, width),
        mode=config["resize_mode"],
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _loaded(model: nn.Module, name: str, source: str, shown: str, device: str) -> LoadedClip:
    tower = tower_from_open_clip(model.visual.float(), name=shown)
    preprocess = open_clip_preprocess(model.visual, shown)
    del model.visual
    return LoadedClip(
        tower=tower,
        preprocess=preprocess,
        model_name=shown,
        pretrained=source,
        weights_hash=weights_hash(tower),
        text=OpenClipText(model, name, device),
    )


def load_open_clip(name: str, pretrained: str, device: str = "cpu") -> LoadedClip:
    """Load an open_clip architecture with a local checkpoint file, or with one of open_clip's tags.

    A tag is open_clip's to resolve: from its cache, or by its own download. Nothing else here touches a network.
    Raises: UserError for an unknown name or tag, no weights, keys or shapes that do not fit, or an unsupported tower.
    """
    named_config(name)
    if not pretrained:
        from open_clip import list_pretrained_tags_by_model

        tags = ", ".join(list_pretrained_tags_by_model(name))
        raise UserError(f"model {name!r}: needs weights; give --pretrained a local checkpoint file or a tag: {tags}")
    if Path(pretrained).is_file():
        state, _ = read_state_dict(pretrained)
        model = _create(name, None)
        _fill(model, state, pretrained)
        return _loaded(model, name, Path(pretrained).name, name, device)
    _check_tag(name, pretrained)
    return _loaded(_create(name, pretrained), name, pretrained, name, device)


def load_open_clip_folder(folder: Path, device: str = "cpu") -> LoadedClip:
    """Load a folder with open_clip_config.json and the weights beside it, as open_clip's hub export writes it."""
    ensure_torchvision()
    file = next((folder / name for name in _FOLDER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: holds open_clip_config.json but no weights; add one of {', '.join(_FOLDER_FILES)}")
    state, _ = read_state_dict(file)
    name = f"local-dir:{folder}"
    model = _create(name, None)
    _fill(model, state, str(file))
    return _loaded(model, name, file.name, folder.name, device)
