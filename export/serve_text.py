"""Class lists that come with a request: names -> tokens -> unit text features, of which the last lists are remembered.

The text tower is a graph like the others; only its tokenizer runs here.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from patchrank.errors import UserError
from patchrank.text import tokenize

Tokenize = Callable[[list[str]], np.ndarray]
"""Texts -> token ids (B, L) int64."""
Encode = Callable[[np.ndarray], Awaitable[np.ndarray]]
"""Token ids (B, L) -> unit features (B, D) float32."""


class BadClasses(ValueError):
    """A class list outside the rules; answered with status 400."""


def tokenizer_of(note: dict[str, Any]) -> Tokenize:
    """The tokenizer that a text tower's manifest names. Raises: UserError where its files are not in the export."""
    if note["kind"] in ("utf-8 bytes", "word pieces"):
        return lambda texts: tokenize(texts, note["context"], note.get("merges", 0)).numpy()
    if note["kind"] == "open_clip":
        import open_clip

        tokenizer = open_clip.get_tokenizer(note["name"])
        return lambda texts: tokenizer(texts).long().numpy()
    raise UserError(
        f"text tower {note.get('name', '')}: its {note['kind']} tokenizer is not part of the export; "
        "serve the image tower alone, and send tokens to the text tower from your side"
    )


def prompts(names: list[str], template: str, max_classes: int) -> list[str]:
    """One text per class name. Raises: BadClasses."""
    if not 2 <= len(names) <= max_classes:
        raise BadClasses(f"{len(names)} class names: give 2 to {max_classes}")
    if any(not name.strip() or len(name) > 200 for name in names):
        raise BadClasses("a class name must have 1 to 200 characters")
    if len(set(names)) < len(names):
        raise BadClasses("a class name is there twice")
    if template.count("{}") != 1 or len(template) > 400:
        raise BadClasses(f"template {template[:80]!r}: must hold {{}} once, in at most 400 characters")
    before, after = template.split("{}")
    return [f"{before}{name}{after}" for name in names]


class ClassLists:
    """Prompts -> unit features (Y, D) float32; the same list is encoded once while it is remembered."""

    def __init__(self, tokenize: Tokenize, encode: Encode, max_batch: int, remembered: int = 64) -> None:
        self._tokenize, self._encode = tokenize, encode
        self._max_batch, self._remembered = max_batch, remembered
        self._known: OrderedDict[tuple[str, ...], np.ndarray] = OrderedDict()

    async def __call__(self, texts: list[str]) -> np.ndarray:
        """Texts of all classes -> one row each."""
        key = tuple(texts)
        if key not in self._known:
            token_YL = await asyncio.to_thread(self._tokenize, texts)
            starts = range(0, len(token_YL), self._max_batch)
            chunks = [await self._encode(token_YL[start : start + self._max_batch]) for start in starts]
            self._known[key] = np.concatenate(chunks)
            while len(self._known) > self._remembered:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


def best(
    feature_D: np.ndarray, text_YD: np.ndarray, scale: float, names: list[str], count: int = 5
) -> list[dict[str, Any]]:
    """The best classes of a unit image feature among unit text features, by probability, best first."""
    logit_Y = scale * (text_YD @ feature_D)
    probability_Y = np.exp(logit_Y - logit_Y.max())
    probability_Y /= probability_Y.sum()
    order = np.argsort(-probability_Y, kind="stable")[:count]
    return [{"name": names[index], "index": int(index), "probability": float(probability_Y[index])} for index in order]
