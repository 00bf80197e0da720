"""Weights of other libraries as `VisionTower`: one file per family, every key and shape accounted for."""

from patchrank.checkpoints.hf_vit import tower_from_hf
from patchrank.checkpoints.open_clip_vit import tower_from_open_clip
from patchrank.checkpoints.timm_vit import tower_from_timm
from patchrank.checkpoints.weights import weights_hash

__all__ = ["tower_from_hf", "tower_from_open_clip", "tower_from_timm", "weights_hash"]
