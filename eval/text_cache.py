"""Text features kept on disk: an ensemble of 80 prompts for 1,000 classes costs hours on a CPU, and never changes.

Letters: T texts, D feature.
"""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eval.records import text_sha256
from patchrank.atomic import write_tensors
from patchrank.checkpoints.loaded import LoadedClip, TextEncoder

logger = logging.getLogger(__name__)

_AGREES = 1 - 1e-4
_SAVED_FROM = 32
"""Fewer texts than this are not worth a file."""


class CachedText:
    """A text encoder that asks a folder first; one file per list of texts, checked against its first text, anew.

    Args: text; folder, None keeps nothing; key, what names the text tower (model, checkpoint, weights).
    """

    def __init__(self, text: TextEncoder, folder: Path | None, key: str) -> None:
        self.text = text
        self.folder = folder
        self.key = key

    @property
    def logit_scale(self) -> float:
        """Factor on the cosine."""
        return self.text.logit_scale

    def __call__(self, texts: list[str]) -> Tensor:
        """Unit rows (T, D) float32, on the encoder's device."""
        if self.folder is None or len(texts) < _SAVED_FROM:
            return self.text(texts)
        path = self.folder / "text" / f"{text_sha256([self.key, *texts])[:24]}.safetensors"
        cached_TD = _read(path, len(texts))
        if cached_TD is not None:
            first_1D = self.text(texts[:1])
            if F.cosine_similarity(first_1D, cached_TD[:1].to(first_1D)).item() > _AGREES:
                return cached_TD.to(first_1D)
            logger.warning("%s: text features of an older code; computed again", path)
        feature_TD = self.text(texts)
        write_tensors(path, {"feature": feature_TD}, {"sha256": _digest(feature_TD)})
        return feature_TD


def _digest(feature_TD: Tensor) -> str:
    return hashlib.sha256(feature_TD.cpu().contiguous().numpy().tobytes()).hexdigest()


def _read(path: Path, num_texts: int) -> Tensor | None:
    """What a whole, undamaged file holds; None otherwise."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            feature_TD = file.get_tensor("feature")
            if file.metadata()["sha256"] == _digest(feature_TD) and len(feature_TD) == num_texts:
                return feature_TD
    except (OSError, SafetensorError, KeyError, TypeError):
        pass
    logger.warning("%s: damaged; its text features are computed again", path)
    return None


def with_text_cache(clip: LoadedClip, folder: Path | None) -> LoadedClip:
    """The same `LoadedClip` with its text encoder, where it has one, behind a cache."""
    if clip.text is None or isinstance(clip.text, CachedText):
        return clip
    key = f"{clip.model_name} {Path(clip.pretrained).name} {clip.weights_hash}"
    return replace(clip, text=CachedText(clip.text, folder, key))
