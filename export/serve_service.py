"""Everything behind the embedded server's routes: models, limits, admission, and the way bodies are read."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from export.serve_batcher import Admission, Run
from export.serve_classify import Classify
from export.serve_folder import ALIAS, ServedFolder
from export.serve_images import ImageReader
from export.serve_metrics import Metrics
from export.serve_models import VERSION, Loaded, Pool, graphs_of, loaded


class TooLarge(ValueError):
    """A body over the byte limit."""


class TooSlow(ValueError):
    """A body that did not arrive in time."""


class UnknownModel(ValueError):
    """A name that is not served."""


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What a client may ask for."""

    max_batch: int = 32
    max_delay_s: float = 0.002
    max_queue: int = 64
    max_bytes: int = 16 << 20
    """Of one body."""
    max_waiting_bytes: int = 256 << 20
    """Of all bodies at a time."""
    max_pixels: int = 40_000_000
    max_classes: int = 200
    read_timeout_s: float = 10.0
    workers: int = 1


class Service:
    """Everything behind the routes; `start` needs a running loop."""

    def __init__(self, folder: ServedFolder, runs: dict[str, Run], limits: ServerLimits) -> None:
        self.folder, self.runs, self.limits = folder, runs, limits
        self.metrics = Metrics()
        self.admission = Admission(limits.max_queue)
        self.bytes = Admission(limits.max_waiting_bytes, "bytes")
        self.models: dict[str, Loaded] = {}
        self.ready = False

    def start(self) -> None:
        """Load the batchers and take requests."""
        limits = self.limits
        self.pool = Pool(limits.workers)
        self.decoding = ThreadPoolExecutor(2, thread_name_prefix="decode")
        for model in graphs_of(self.folder):
            sizes = {"max_batch": limits.max_batch, "max_delay_s": limits.max_delay_s}
            self.models[model.name] = loaded(model, self.runs[model.name], self.pool, self.metrics, **sizes)
            self.models[model.name].batcher.start()
        self.models[ALIAS] = self.models[self.folder.default.name]
        reader = ImageReader(self.folder.preprocess, limits.max_pixels)
        self.classify = Classify(self.folder, self.models, reader, self.decoding, limits.max_classes)
        self.ready = True

    async def stop(self) -> None:
        """Take nothing more, answer what is inside, release the threads."""
        self.ready, self.admission.closed = False, True
        await asyncio.gather(*(model.batcher.stop() for model in {id(m): m for m in self.models.values()}.values()))
        self.decoding.shutdown(wait=True)
        self.pool.executor.shutdown(wait=True)

    def model(self, name: str, version: str = VERSION) -> Loaded:
        """Raises: UnknownModel."""
        if name not in self.models or version != VERSION:
            known = ", ".join(self.models)
            raise UnknownModel(f"model {name[:80]!r} version {version[:20]!r}: unknown; this server has {known}")
        return self.models[name]

    async def body(self, request) -> bytes:
        """All bytes of a request. Raises: TooLarge, TooSlow, Overloaded (too many bodies at once)."""
        limit = self.limits.max_bytes
        said = request.headers.get("content-length", "")
        if said.isdigit() and int(said) > limit:
            raise TooLarge(f"{said} bytes: more than {limit}; send less")
        try:
            async with asyncio.timeout(self.limits.read_timeout_s):
                return await self._read(request, limit)
        except TimeoutError as error:
            raise TooSlow(f"the body did not arrive within {self.limits.read_timeout_s:g} s") from error

    async def _read(self, request, limit: int) -> bytes:
        parts, size = [], 0
        try:
            async for part in request.stream():
                self.bytes.enter(len(part))
                size += len(part)
                if size > limit:
                    raise TooLarge(f"more than {limit} bytes; send less")
                parts.append(part)
            return b"".join(parts)
        finally:
            self.bytes.leave(size)

    def info(self) -> dict[str, Any]:
        """What the page shows before it has a picture."""
        folder = self.folder
        return {
            "backbone": folder.manifest["backbone"]["model"],
            "variants": [{"model": m.name, "macs_share": m.macs_share} for m in folder.variants],
            "default": folder.default.name,
            "grid": list(folder.grid),
            "class_names": folder.class_names,
            "own_classes": folder.text is not None,
            "template": folder.template,
            "example": folder.manifest["config"]["data"] == "digits",
        }
