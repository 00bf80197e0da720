"""A folder of a Hugging Face CLIP or SigLIP model -> `LoadedClip`; the image half needs no transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchrank.checkpoints.hf_vit import hf_tower
from patchrank.checkpoints.loaded import LoadedClip
from patchrank.checkpoints.weights import read_state_dict, weights_hash
from patchrank.errors import UserError
from patchrank.preprocess import Preprocess
from patchrank.text_encoders import HfText
from patchrank.torchvision_shim import ensure_torchvision

_FILES = ("model.safetensors", "pytorch_model.bin")
_FILTERS = {2: "bilinear", 3: "bicubic"}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); restore the file of the original model") from error


def read_folder_weights(folder: Path) -> dict[str, Tensor]:
    """The state dict of a model folder, whole or in shards listed by an index file."""
    for name in _FILES:
        if (folder / name).is_file():
            return read_state_dict(folder / name)[0]
        if (index := folder / f"{name}.index.json").is_file():
            state: dict[str, Tensor] = {}
            places: dict[str, str] = _read_json(index).get("weight_map", {})
            for shard in sorted(set(places.values())):
                if Path(shard).name != shard:
                    raise UserError(f"{index}: shard {shard!r} must be a file of this folder; correct the index")
                state |= read_state_dict(folder / shard)[0]
            if set(state) != set(places):
                wrong = sorted(set(state) ^ set(places))
                raise UserError(f"{index}: keys {', '.join(wrong[:8])} must be in the index and a shard; copy again")
            return state
    raise UserError(f"{folder}: must hold one of {', '.join(_FILES)} or its .index.json; copy the weights here")


def _pair(value: Any) -> tuple[int, int] | None:
    """(H, W) from the ways in which transformers writes a size; None if only the shortest edge is given."""
    if isinstance(value, int):
        return value, value
    return (value["height"], value["width"]) if "height" in value else None


def hf_preprocess(folder: Path, image_size: tuple[int, int]) -> Preprocess:
    """The transform of preprocessor_config.json (or of processor_config.json, where newer versions keep it)."""
    path = folder / "preprocessor_config.json"
    if not path.is_file() and (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"
    config = _read_json(path)
    config = config.get("image_processor", config)
    size, crop = config.get("size"), config.get("crop_size")
    # Before sizes were dictionaries, one number meant the shortest edge where a crop follows.
    shortest = size if isinstance(size, int) else (size or {}).get("shortest_edge")
    resample = config.get("resample", 3)
    cropped = config.get("do_center_crop", crop is not None)
    usual = config.get("do_resize", True) and config.get("do_normalize", True) and config.get("do_rescale", True)
    if not usual or size is None or resample not in _FILTERS or (cropped and crop is None):
        raise UserError(
            f"{path}: must resize with bilinear or bicubic filter, rescale and normalise; load another image processor"
        )
    if cropped:
        final, resize, mode = _pair(crop), shortest if shortest is not None else _pair(size), "shortest"
        mode = mode if shortest is not None else "squash"
    else:
        final = resize = _pair(size)
        mode = "squash"
    if final != image_size:
        raise UserError(f"{path}: gives images of {final}, the tower takes {image_size}; copy the model's own file")
    mean, std = config["image_mean"], config["image_std"]
    filter_name = _FILTERS[resample]
    return Preprocess(
        image_size=final, resize=resize, mode=mode, interpolation=filter_name, mean=tuple(mean), std=tuple(std)
    )


def _text(folder: Path, config: dict[str, Any], device: str | torch.device) -> HfText | None:
    """The text half in transformers' own code; None for image-only folders."""
    if "text_config" not in config:
        return None
    ensure_torchvision()
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{folder}: its text tower needs transformers; pip install transformers") from error
    kind = transformers.CLIPModel if config["model_type"] == "clip" else transformers.SiglipModel
    model, report = kind.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    faults = {what: sorted(map(str, report[what])) for what in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for what, keys in faults.items():
        if keys:
            raise UserError(f"{folder}: {what.replace('_', ' ')}: {', '.join(keys[:8])}; every key must have its place")
    del model.vision_model
    return HfText(model, folder, device)


def load_hf(folder: Path, device: str | torch.device = "cpu") -> LoadedClip:
    """Load a folder with config.json, weights, preprocessor_config.json and, for text, the tokenizer's files.

    Raises: UserError for other model families, keys or shapes that do not fit, or missing files.
    """
    config = _read_json(folder / "config.json")
    state = {key: tensor.float() for key, tensor in read_folder_weights(folder).items()}
    tower = hf_tower(config, state, str(folder))
    return LoadedClip(
        tower=tower,
        preprocess=hf_preprocess(folder, tower.config.image_size),
        model_name=folder.resolve().name,
        pretrained=str(config.get("_name_or_path", "")),
        weights_hash=weights_hash(tower),
        text=_text(folder, config, device),
    )
