"""Hugging Face CLIP and SigLIP image towers, from their configuration and state dict; needs no transformers."""

from typing import Any

import torch
from torch import Tensor, nn

from patchrank.checkpoints.weights import Weights, build_tower, unsupported
from patchrank.errors import UserError
from patchrank.tower import TowerConfig, VisionTower

_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# What the configuration classes of transformers fill in for a field that config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {
        "image_size": 224,
        "patch_size": 32,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "num_channels": 3,
    },
    "siglip": {
        "image_size": 224,
        "patch_size": 16,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "num_channels": 3,
        "vision_use_head": True,
    },
}
_FAMILIES = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
}
_CLASSES = (
    "CLIPModel",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "SiglipModel",
    "SiglipVisionModel",
)


def hf_family(config: dict[str, Any], name: str) -> str:
    """ "clip" or "siglip" of a parsed config.json; UserError naming any other model type or class."""
    model_type = config.get("model_type")
    if model_type not in _FAMILIES:
        naflex = str(model_type).startswith("siglip2")
        why = "its images have varying numbers of patches (NaFlex)" if naflex else "it is neither CLIP nor SigLIP"
        raise unsupported(name, f"model type {model_type!r}: {why}")
    strange = [entry for entry in config.get("architectures") or [] if entry not in _CLASSES]
    if strange:
        raise unsupported(name, f"its class {strange[0]} is not one of {', '.join(_CLASSES)}")
    return _FAMILIES[model_type]


def hf_config(config: dict[str, Any], output_dim: int | None, name: str) -> TowerConfig:
    """Our configuration from a parsed config.json; `output_dim` columns of CLIP's projection, None without."""
    family = hf_family(config, name)
    vision = _DEFAULTS[family] | {
        key: value for key, value in config.get("vision_config", config).items() if value is not None
    }
    if not vision.get("vision_use_head", True):
        raise unsupported(name, "it has no pooling head (vision_use_head is false)")
    if vision["num_channels"] != 3:
        raise unsupported(name, "it has images that are not RGB")
    if vision["hidden_act"] not in _ACTIVATIONS:
        raise unsupported(name, f"its activation {vision['hidden_act']!r} is not one of {', '.join(_ACTIVATIONS)}")
    size, patch_size = vision["image_size"], vision["patch_size"]
    if not isinstance(size, int) or not isinstance(patch_size, int):
        raise unsupported(name, f"it has images {size} or patches {patch_size} that are not square")
    clip = family == "clip"
    return TowerConfig(
        image_size=(size, size),
        patch_size=patch_size,
        width=vision["hidden_size"],
        num_layers=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        mlp_width=vision["intermediate_size"],
        activation=_ACTIVATIONS[vision["hidden_act"]],
        norm_eps=vision["layer_norm_eps"],
        num_prefix=1 if clip else 0,
        patch_bias=not clip,
        pre_norm=clip,
        pool="class" if clip else "attention",
        output_dim=output_dim if clip else None,
    )


def _block_state(weights: Weights, config: TowerConfig, prefix: str, index: int) -> dict[str, Tensor]:
    theirs, ours = f"{prefix}encoder.layers.{index}", f"blocks.{index}"
    C, M = config.width, config.mlp_width
    qkv = [weights.take_linear(f"{theirs}.self_attn.{part}_proj", "", C, C) for part in "qkv"]
    state = {f"{ours}.qkv{key}": torch.cat([part[key] for part in qkv]) for key in (".weight", ".bias")}
    state |= weights.take_linear(f"{theirs}.self_attn.out_proj", f"{ours}.out", C, C)
    state |= weights.take_norm(f"{theirs}.layer_norm1", f"{ours}.norm1", C)
    state |= weights.take_norm(f"{theirs}.layer_norm2", f"{ours}.norm2", C)
    state |= weights.take_linear(f"{theirs}.mlp.fc1", f"{ours}.fc1", M, C)
    return state | weights.take_linear(f"{theirs}.mlp.fc2", f"{ours}.fc2", C, M)


def _pool_state(weights: Weights, config: TowerConfig, prefix: str) -> dict[str, Tensor]:
    C, M, head = config.width, config.mlp_width, f"{prefix}head"
    qkv = weights.take_fused_qkv(f"{head}.attention", "", C)
    state = {"pool.query": weights.take(f"{head}.probe", 1, 1, C)}
    for part in ("weight", "bias"):
        state |= {f"pool.q.{part}": qkv[f".{part}"][:C], f"pool.kv.{part}": qkv[f".{part}"][C:]}
    state |= weights.take_linear(f"{head}.attention.out_proj", "pool.out", C, C)
    state |= weights.take_norm(f"{head}.layernorm", "pool.norm", C)
    state |= weights.take_linear(f"{head}.mlp.fc1", "pool.fc1", M, C)
    return state | weights.take_linear(f"{head}.mlp.fc2", "pool.fc2", C, M)


def hf_state(weights: Weights, config: TowerConfig, prefix: str) -> dict[str, Tensor]:
    """Our state dict from Hugging Face's names; `prefix` is "vision_model." or empty."""
    N, C, size = config.num_patches, config.width, config.patch_size
    clip = config.pool == "class"
    position_LC = weights.take(f"{prefix}embeddings.position_embedding.weight", N + config.num_prefix, C)
    state = {"patch.weight": weights.take(f"{prefix}embeddings.patch_embedding.weight", C, 3, size, size)}
    state |= {"prefix": position_LC[: config.num_prefix], "position": position_LC[config.num_prefix :]}
    if clip:
        state["prefix"] = state["prefix"] + weights.take(f"{prefix}embeddings.class_embedding", C)
        state |= weights.take_norm(f"{prefix}pre_layrnorm", "norm_pre", C)
    else:
        state["patch.bias"] = weights.take(f"{prefix}embeddings.patch_embedding.bias", C)
        state |= _pool_state(weights, config, prefix)
    for index in range(config.num_layers):
        state |= _block_state(weights, config, prefix, index)
    state |= weights.take_norm(f"{prefix}post_layernorm", "norm", C)
    if config.output_dim:
        state["proj.weight"] = weights.take("visual_projection.weight", config.output_dim, C)
    return state


def _drop_position_ids(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Without the counters 0, 1, 2, ... that transformers before 4.31 stored beside the weights."""
    kept = {}
    for key, tensor in state.items():
        if not key.endswith("embeddings.position_ids"):
            kept[key] = tensor
        elif not torch.equal(tensor.flatten().cpu().long(), torch.arange(tensor.numel())):
            raise UserError(f"{name}: key {key!r} must count 0, 1, 2, ...; the checkpoint re-orders positions")
    return kept


def hf_tower(config: dict[str, Any], state: dict[str, Tensor], name: str) -> VisionTower:
    """Tower from a parsed config.json and the whole model's state dict; text keys are left to transformers.

    Raises: UserError for another model family, an unsupported option, or any image key missing, left or mis-shaped.
    """
    text = ("text_model.", "text_projection.", "logit_scale", "logit_bias") if "vision_config" in config else ()
    image = {key: tensor for key, tensor in _drop_position_ids(state, name).items() if not key.startswith(text)}
    projected = (
        "CLIPVisionModel" not in config["architectures"]
        if config.get("architectures")
        else "vision_config" in config or "visual_projection.weight" in image
    )
    tower_config = hf_config(config, config.get("projection_dim", 512) if projected else None, name)
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in image) else ""
    weights = Weights(image, name)
    ours = hf_state(weights, tower_config, prefix)
    weights.close()
    return build_tower(tower_config, ours, name)


def tower_from_hf(model: nn.Module, *, name: str = "Hugging Face model") -> VisionTower:
    """Tower with copied weights whose output is the model's pooled, projected image feature, before normalisation.

    Takes CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection, SiglipModel and SiglipVisionModel.
    Raises: UserError for any other class, naming it.
    """
    if type(model).__name__ not in _CLASSES:
        raise unsupported(name, f"its class {type(model).__name__} is not one of {', '.join(_CLASSES)}")
    return hf_tower(model.config.to_dict() | {"architectures": [type(model).__name__]}, model.state_dict(), name)
