"""Texts -> unit features, with whichever text tower the checkpoint brings: open_clip's, transformers' or our own.

open_clip's and transformers' towers run in their own code with their own tokenizers: nothing is pruned there.
Tokenizers load at the first call, so that image-only work never needs their files.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.text import TextTower

_BATCH = 256


def _encode(texts: list[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
    """Unit rows (n, D) float32 of chunks of texts."""
    if not texts:
        raise UserError("texts=[]: must hold at least one text; give a caption or a class name")
    with torch.no_grad():
        chunks = [encode(texts[start : start + _BATCH]).float() for start in range(0, len(texts), _BATCH)]
    return F.normalize(torch.cat(chunks), dim=-1)


class OwnText:
    """Encoder around our own `TextTower`."""

    def __init__(self, tower: TextTower, logit_scale: float) -> None:
        self.tower = tower.eval().requires_grad_(False)
        self.logit_scale = logit_scale

    def __call__(self, texts: list[str]) -> Tensor:
        device = self.tower.position.device
        return _encode(texts, lambda chunk: self.tower(self.tower.tokenize(chunk).to(device)))


class OpenClipText:
    """Encoder around an open_clip model whose image tower has been taken out."""

    def __init__(self, model: nn.Module, name: str, device: str | torch.device) -> None:
        self.model = model.eval().requires_grad_(False).to(device)
        self.name = name
        self.device = device

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.exp())

    @cached_property
    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """open_clip's tokenizer of this model; some of them are files of the Hugging Face hub."""
        import open_clip

        try:
            return open_clip.get_tokenizer(self.name)
        except Exception as error:
            raise _no_tokenizer(self.name, error) from error

    def __call__(self, texts: list[str]) -> Tensor:
        return _encode(texts, lambda chunk: self.model.encode_text(self.tokenizer(chunk).to(self.device)))


class HfText:
    """Encoder around the text half of a transformers CLIP or SigLIP model with the tokenizer of the same folder."""

    def __init__(self, model: nn.Module, folder: Path, device: str | torch.device) -> None:
        self.model = model.eval().requires_grad_(False).to(device)
        self.folder = folder
        self.device = device

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.exp())

    @cached_property
    def tokenizer(self) -> Callable:
        """The folder's tokenizer; never the hub's."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:
            raise _no_tokenizer(str(self.folder), error) from error

    def _features(self, texts: list[str]) -> Tensor:
        """No attention mask: CLIP's causal tower never looks past the end token, SigLIP was trained on its padding."""
        clip = self.model.config.model_type == "clip"
        # SigLIP 2 was trained on lower case; its Gemma tokenizer leaves that to the caller.
        if not clip and type(self.tokenizer).__name__.startswith("Gemma"):
            texts = [text.lower() for text in texts]
        length = self.model.config.text_config.max_position_embeddings
        padding = "longest" if clip else "max_length"
        inputs = self.tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
        found = self.model.get_text_features(input_ids=inputs["input_ids"].to(self.device))
        return getattr(found, "pooler_output", found)

    def __call__(self, texts: list[str]) -> Tensor:
        return _encode(texts, self._features)


def _no_tokenizer(name: str, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"{name}: its tokenizer cannot be loaded ({reason}); put its files beside the weights")
