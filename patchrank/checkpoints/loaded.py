"""What every loader returns: an image tower with its transform, and text or a classifier head to compare with."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from patchrank.preprocess import Preprocess
from patchrank.tower import VisionTower


class TextEncoder(Protocol):
    """Texts -> (n, D) float32 unit rows on the tower's device, comparable with its normalised features."""

    @property
    def logit_scale(self) -> float:
        """Factor on the cosine before softmax (CLIP) or sigmoid (SigLIP)."""
        ...

    def __call__(self, texts: list[str]) -> Tensor: ...


@dataclass
class LoadedClip:
    """A frozen image tower and what its features are compared with."""

    tower: VisionTower
    preprocess: Preprocess
    model_name: str
    pretrained: str
    weights_hash: str
    """SHA-256 of the image tower's float32 weights (`patchrank.checkpoints.weights_hash`)."""
    text: TextEncoder | None = None
    class_head: tuple[Tensor, Tensor] | None = None
    """A classifier's rows: weight (C, D) and bias (C,) float32, to be applied to features that are *not* normalised."""
