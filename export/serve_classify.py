"""`POST /classify`: a picture's bytes in; best classes, kept patches and where they lie in the picture out.

Query: `model` (a served name; default the alias), `class` (once per name: a class list for this request alone, if the
text tower is there), `template` (the prompt around these names).
"""

import asyncio
import io
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.serve_folder import ALIAS, TEXT, ServedFolder
from export.serve_images import Decoded, ImageReader
from export.serve_models import Loaded
from export.serve_protocol import BadRequest
from export.serve_text import BadClasses, ClassLists, best, prompts, tokenizer_of
from patchrank.data.digits import NUM_IMAGES, draw_digit

_KNOWN = {"model", "class", "template"}


@dataclass(frozen=True)
class Asked:
    """A checked query."""

    model: Loaded
    names: list[str]
    texts: list[str]
    """Prompts of the request's own class list; empty for the list in the graph."""


class Classify:
    """The route's work, apart from HTTP."""

    def __init__(
        self,
        folder: ServedFolder,
        models: Mapping[str, Loaded],
        reader: ImageReader,
        decoding: Executor,
        max_classes: int,
    ) -> None:
        self.folder, self.models, self.reader, self.decoding = folder, models, reader, decoding
        self.max_classes = max_classes
        self.lists: ClassLists | None = None
        if folder.text is not None:
            batcher = models[TEXT].batcher
            (token,) = models[TEXT].inputs

            async def encode(token_BL: np.ndarray) -> np.ndarray:
                return (await batcher({token.name: token_BL}))["feature"]

            self.lists = ClassLists(tokenizer_of(folder.text_manifest["tokenizer"]), encode, batcher.max_batch)

    def read(self, query) -> Asked:
        """Check a query (Starlette's). Raises: BadRequest, BadClasses."""
        unknown = sorted(set(query) - _KNOWN)
        if unknown:
            raise BadRequest(f"{unknown[0][:40]!r}: unknown; /classify takes {', '.join(sorted(_KNOWN))}")
        name = query.get("model", ALIAS)
        if name not in self.models or name == TEXT:
            known = ", ".join(known for known in self.models if known != TEXT)
            raise BadRequest(f"model {name[:80]!r}: unknown; choose one of {known}")
        names, template = query.getlist("class"), query.get("template", self.folder.template)
        if names and self.lists is None:
            raise BadClasses("this server has no text tower; leave the class list out")
        if not names and not self.folder.class_names:
            raise BadClasses("this model has no class list of its own; give one: /classify?class=cat&class=dog")
        texts = prompts(names, template, self.max_classes) if names else []
        return Asked(self.models[name], names, texts)

    async def __call__(self, asked: Asked, body: bytes) -> dict[str, Any]:
        """The answer as JSON values. Raises: BadImage."""
        start = time.perf_counter()
        loop = asyncio.get_running_loop()
        decoded = await loop.run_in_executor(self.decoding, self.reader, body)
        (image,) = asked.model.inputs
        values = await asked.model.batcher({image.name: decoded.image_HW3[None]})
        top = await self._top(asked, values)
        return {
            "model": asked.model.name,
            "macs_share": asked.model.macs_share,
            "top": top,
            **self._patches(values, decoded),
            "ms": 1000 * (time.perf_counter() - start),
        }

    async def _top(self, asked: Asked, values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        if asked.texts:
            text_YD = await self.lists(asked.texts)
            scale = self.folder.text_manifest["logit_scale"]
            return best(values["feature"][0], text_YD, scale, asked.names)
        names = self.folder.class_names
        pairs = zip(values["top5_index"][0].tolist(), values["top5_probability"][0].tolist())
        return [{"name": names[index], "index": index, "probability": value} for index, value in pairs]

    def _patches(self, values: dict[str, np.ndarray], decoded: Decoded) -> dict[str, Any]:
        """`kept`: positions row by row, most important first; null where the graph keeps them all."""
        kept = values.get("kept")
        return {
            "grid": list(self.folder.grid),
            "kept": None if kept is None else kept[0].tolist(),
            "size": list(decoded.size),
            "crop": list(decoded.crop),
        }


def image_of_example(folder: ServedFolder, number: str) -> bytes:
    """PNG of one canvas of the drawn data set's test split. Raises: BadRequest where the model knows nothing of it."""
    if folder.manifest["config"]["data"] != "digits":
        raise BadRequest("this model has no examples; send a picture of your own")
    if not (number.isascii() and number.isdigit()) or not int(number[:9]) < NUM_IMAGES["test"]:
        raise BadRequest(f"number={number[:20]!r}: must lie in 0 to {NUM_IMAGES['test'] - 1}")
    buffer = io.BytesIO()
    draw_digit(f"test/{int(number[:9]):06d}").save(buffer, "PNG")
    return buffer.getvalue()
