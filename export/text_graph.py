"""The text tower as a graph: token ids in, unit features out, so that a deployed CLIP answers any class list.

Tokenising stays with the client; the manifest names the tokenizer and its padding.

Letters: B texts, L tokens, D feature.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.loading import LoadedClip
from patchrank.text import END, PAD, START, TextTower
from patchrank.text_encoders import HfText, OpenClipText, OwnText
from patchrank.tokens import gather_tokens


class TextGraph(nn.Module):
    """Token ids (B, L) int64 -> unit feature (B, D) float32; the batch is free, L is fixed."""

    input_name = "token"
    output_names = ("feature",)

    def __init__(self, encode: nn.Module) -> None:
        super().__init__()
        self.encode = encode
        self.answer = _Unit()

    def forward(self, token_BL: Tensor) -> Tensor:
        return self.answer(self.encode(token_BL))


class _Unit(nn.Module):
    """Named like the image graph's last part, and float32 in every precision like it."""

    def forward(self, feature_BD: Tensor) -> Tensor:
        return F.normalize(feature_BD.float(), dim=-1)


class _Own(nn.Module):
    """`TextTower.forward` with the output at END taken by a gather of rows, so that the batch stays free."""

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, token_BL: Tensor) -> Tensor:
        tower = self.tower
        x_BLC = tower.token(token_BL) + tower.position[: token_BL.shape[1]]
        bias_B11L = torch.where(token_BL == PAD, float("-inf"), 0.0).to(x_BLC.dtype)[:, None, None]
        for block in tower.blocks:
            x_BLC = block(x_BLC, bias_B11L)
        if tower.config.pool == "mean":
            return tower.proj(tower.mean(x_BLC, token_BL))
        end_B1 = (token_BL == END).int().argmax(1, keepdim=True)
        return tower.proj(tower.norm(gather_tokens(x_BLC, end_B1)[:, 0]))


class _OpenClip(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_BL: Tensor) -> Tensor:
        return self.model.encode_text(token_BL)


class _HuggingFace(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_BL: Tensor) -> Tensor:
        found = self.model.get_text_features(input_ids=token_BL)
        return getattr(found, "pooler_output", found)


def text_graph(clip: LoadedClip) -> TextGraph:
    """The graph of a model's text tower. Raises: UserError for a model without one."""
    if isinstance(clip.text, OwnText):
        return TextGraph(_Own(clip.text.tower)).eval()
    if isinstance(clip.text, OpenClipText):
        return TextGraph(_OpenClip(clip.text.model)).eval()
    if isinstance(clip.text, HfText):
        return TextGraph(_HuggingFace(clip.text.model)).eval()
    raise UserError(f"model {clip.model_name}: has no text tower to export; use --tower image")


def tokens_of(clip: LoadedClip, texts: list[str]) -> Tensor:
    """Token ids (B, L) int64 of texts, padded to the tower's full context."""
    if isinstance(clip.text, OwnText):
        return clip.text.tower.tokenize(texts)
    if isinstance(clip.text, OpenClipText):
        return clip.text.tokenizer(texts).long()
    length = clip.text.model.config.text_config.max_position_embeddings
    padded = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    return clip.text.tokenizer(texts, **padded)["input_ids"].long()


def tokenizer_note(clip: LoadedClip) -> dict[str, str | int]:
    """What a client needs in order to make the same tokens."""
    if isinstance(clip.text, OwnText):
        config = clip.text.tower.config
        kind = {"kind": "word pieces", "merges": config.num_merges} if config.num_merges else {"kind": "utf-8 bytes"}
        return kind | {"context": config.context, "start": START, "end": END, "pad": PAD}
    kind = "open_clip" if isinstance(clip.text, OpenClipText) else "transformers"
    return {"kind": kind, "name": clip.model_name, "context": int(tokens_of(clip, ["a"]).shape[1])}


@torch.no_grad()
def text_features(graph: TextGraph, token_BL: Tensor, *, half: bool = False) -> Tensor:
    """PyTorch's unit features (B, D), in float32 or in its own float16."""
    encode = copy.deepcopy(graph.encode).half() if half else graph.encode
    return graph.answer(encode(token_BL))
