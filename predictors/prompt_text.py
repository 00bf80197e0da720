"""Learned tokens in front of the class names, through the checkpoint's own text tower, with a gradient to the tokens.

The texts hold placeholders; what the tower's token embedding says at their places is replaced by the learned rows, so
our own and open_clip's towers run in their own code.

Letters: T learned tokens, Y classes, L text tokens, C width of the text tower, D feature.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.loading import LoadedClip
from patchrank.text import END
from patchrank.text_encoders import OpenClipText, OwnText

_PLACEHOLDER = "X"
_START_STD = 0.02


@dataclass(frozen=True)
class TextParts:
    """What prompting needs of a text tower."""

    embedding: nn.Embedding
    tokens: Callable[[list[str]], Tensor]
    """Texts -> ids (n, L) int64, the first of every row a start token."""
    features: Callable[[Tensor], Tensor]
    """Ids -> features (n, D), not normalised; differentiable in what the embedding gives."""
    end: Callable[[Tensor], int]
    """Ids (L,) -> place of the end token."""
    joint: str
    """What stands between two placeholders so that each becomes one token."""


def text_parts(clip: LoadedClip) -> TextParts:
    """Parts of a model's text tower. Raises: UserError for a model without one, or one whose inside is not known."""
    if isinstance(clip.text, OwnText):
        tower = clip.text.tower
        device = tower.position.device
        return TextParts(
            embedding=tower.token,
            tokens=lambda texts: tower.tokenize(texts).to(device),
            features=tower,
            end=lambda ids_L: int((ids_L == END).int().argmax()),
            joint=" " if tower.config.num_merges else "",
        )
    if isinstance(clip.text, OpenClipText):
        encoder, model = clip.text, clip.text.model
        return TextParts(
            embedding=getattr(model, "text", model).token_embedding,
            tokens=lambda texts: encoder.tokenizer(texts).to(encoder.device),
            features=model.encode_text,
            end=lambda ids_L: int(ids_L.argmax()),
            joint=" ",
        )
    kind = "no text tower" if clip.text is None else type(clip.text).__name__
    raise UserError(
        f"model {clip.model_name}: has {kind}; prompts need our own or an open_clip text tower, as --model embedded"
    )


class PromptedClasses(nn.Module):
    """Class directions under learned tokens: tokens (T, C) -> unit rows (Y, D) float32.

    Args: clip; class_names; template with one {}: what stands behind {} is kept, what stands before is replaced.
    Raises: UserError as `text_parts`, or if the tokens leave no room for a class name.
    """

    def __init__(self, clip: LoadedClip, class_names: Sequence[str], template: str, num_tokens: int) -> None:
        super().__init__()
        self.parts = text_parts(clip)
        self.num_tokens = num_tokens
        self.before, behind = template.split("{}")
        placeholders = self.parts.joint.join([_PLACEHOLDER] * num_tokens) + self.parts.joint
        ids_YL = self.parts.tokens([placeholders + name + behind for name in class_names])
        plain_YL = self.parts.tokens([name + behind for name in class_names])
        for name, ids_L, plain_L in zip(class_names, ids_YL, plain_YL):
            if self.parts.end(ids_L) != num_tokens + self.parts.end(plain_L):
                raise UserError(
                    f"--num-tokens {num_tokens}: with class {name!r} longer than the {len(ids_L)} tokens of this "
                    "text tower; use fewer"
                )
        self.register_buffer("ids_YL", ids_YL)

    @torch.no_grad()
    def start(self, seed: int) -> Tensor:
        """Tokens (T, C) to begin with: the last of the words that stand before {}, and random ones before them."""
        generator = torch.Generator().manual_seed(seed)
        weight_VC = self.parts.embedding.weight
        start_TC = _START_STD * torch.randn(self.num_tokens, weight_VC.shape[1], generator=generator)
        ids_L = self.parts.tokens([self.before])[0]
        words = ids_L[1 : self.parts.end(ids_L)][-self.num_tokens :]
        start_TC[self.num_tokens - len(words) :] = weight_VC[words].cpu().float()
        return start_TC.to(weight_VC.device)

    def forward(self, token_TC: Tensor) -> Tensor:
        with _replaced(self.parts.embedding, token_TC):
            return F.normalize(self.parts.features(self.ids_YL).float(), dim=-1)


@contextmanager
def _replaced(embedding: nn.Embedding, token_TC: Tensor) -> Iterator[None]:
    """Let rows 1 .. T of what the embedding gives be the learned ones."""

    def replace(module: nn.Module, inputs: tuple, x_YLC: Tensor) -> Tensor:
        rows_YTC = token_TC.to(x_YLC.dtype).expand(x_YLC.shape[0], -1, -1)
        return torch.cat([x_YLC[:, :1], rows_YTC, x_YLC[:, 1 + len(token_TC) :]], dim=1)

    handle = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
