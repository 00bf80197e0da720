"""Hugging Face CLIP and SigLIP: inside the vision model embeddings and encoder are swapped, the rest is copied.

The vision model of transformers is embeddings -> (norm) -> encoder -> norm, pool. Our tower embeds, so the copy's
embeddings hand the image on, and its encoder returns a token for every position to the untouched norm and pool.
Nothing here imports transformers.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchrank.adapters.position_tokens import check_grid, position_tokens
from patchrank.checkpoints.hf_vit import hf_tower
from patchrank.errors import UserError
from patchrank.macs import head_macs, pruned_macs
from patchrank.pruned import PrunedTower
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig, VisionTower

_CLASSES = ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipModel", "SiglipVisionModel")
_EXTRAS = ("output_hidden_states", "output_attentions")


class EncoderOutput(NamedTuple):
    """What the vision model reads from its encoder."""

    last_hidden_state: Tensor
    hidden_states: None = None
    attentions: None = None


class ImageThrough(nn.Module):
    """Stands where the embeddings stood and hands the image on; the encoder refuses sizes that are not the tower's."""

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        return pixel_values


class PrunedEncoder(nn.Module):
    """Stands where the encoder stood: image (B, 3, H, W) -> tokens as `position_tokens` gives them."""

    def __init__(self, pruned: PrunedTower) -> None:
        super().__init__()
        self.pruned = pruned

    def forward(self, inputs_embeds: Tensor, *_, **options) -> EncoderOutput:
        asked = [name for name in _EXTRAS if options.get(name)]
        if asked:
            raise UserError(f"{asked[0]}=True: a pruned tower has no full token maps inside; use the original model")
        check_grid(self.pruned, inputs_embeds)
        image_BCHW = inputs_embeds.to(self.pruned.tower.patch.weight.dtype)
        return EncoderOutput(position_tokens(self.pruned, image_BCHW))


def _vision(model: nn.Module) -> nn.Module:
    return getattr(model, "vision_model", model)


def tower(model: nn.Module) -> VisionTower:
    """Copy of the image tower without projection. Raises: UserError for other classes and options."""
    name = type(model).__name__
    known = [cls.__name__ for cls in type(model).__mro__ if cls.__name__ in _CLASSES]
    if not known:
        raise UserError(f"{name}: this Hugging Face class is not supported; use one of {', '.join(_CLASSES)}")
    config = getattr(model.config, "vision_config", model.config)
    asked = [option for option in _EXTRAS if getattr(config, option, False) or getattr(model.config, option, False)]
    if asked:
        raise UserError(f"{name}: its config asks for {asked[0]}, which a pruned tower has not; set it to False")
    plain = "SiglipVisionModel" if known[0].startswith("Siglip") else "CLIPVisionModel"
    return hf_tower(config.to_dict() | {"architectures": [plain]}, _vision(model).state_dict(), name)


def _trained_head(model: nn.Module, pruned: PrunedTower) -> dict[int, nn.Module]:
    """Modules of the model behind its encoder -> those of the pruned tower, which a calibration may have changed.

    Raises: UserError where the model computes itself what was calibrated.
    """
    vision, whole, projection = _vision(model), pruned.tower, getattr(model, "visual_projection", None)
    if pruned.config.pool == "class":
        if projection is None and pruned.config.output_bias:
            raise UserError(f"{type(model).__name__}: has no projection to take a readout; calibrate without --readout")
        swapped = {id(vision.post_layernorm): whole.norm}
        return swapped | ({id(projection): whole.proj} if projection is not None and pruned.config.output_dim else {})
    own, now = tower(model).state_dict(), whole.state_dict()
    if any(not torch.equal(own[name].to(now[name]), now[name]) for name in own if name.startswith(("norm", "pool"))):
        raise UserError(f"{type(model).__name__}: pools by itself, so a calibrated pool has no place; use open_clip")
    return {}


def attach(model: nn.Module, pruned: PrunedTower) -> nn.Module:
    """Deep copy of `model` with embeddings and encoder of its vision model replaced, norm and projection likewise."""
    vision = _vision(model)
    memo = _trained_head(model, pruned)
    memo |= {id(vision.embeddings): ImageThrough(), id(vision.encoder): PrunedEncoder(pruned)}
    if pruned.config.pre_norm:
        memo[id(vision.pre_layrnorm)] = nn.Identity()
    copied = copy.deepcopy(model, memo)
    return copied.train(model.training)


def cost(config: TowerConfig, spec: PruneSpec) -> int:
    """As `pruned_macs`, but the last block computes every row, since `last_hidden_state` is an output here, and
    SigLIP's pool reads a token for every position."""
    counts = [K for _, K in spec.counts(config.num_patches)]
    left = counts[-1] if counts and spec.rest == "fold" else config.num_patches
    unfolded = head_macs(config, config.num_prefix + config.num_patches) - head_macs(config, config.num_prefix + left)
    return pruned_macs(config, spec, class_row_only=False) + unfolded
