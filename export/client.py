"""A client of either server (Triton, or `export.serve`), and one that prunes more while the server is under pressure.

The wire is NVIDIA's `tritonclient`; here is only what a caller decides by: an answer, a refusal (the server is full,
come back later or ask for less), or anything else.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from export.adaptive import Level, Moment, Policy, step
from patchrank.errors import UserError

_FULL = ("maximum queue size", "timeout expired", "would exceed")
"""What Triton and we say when a queue is full; a server that is down or broken says something else."""


class Refused(Exception):
    """The server is full; nothing was computed."""


class Failed(Exception):
    """No answer, for another reason."""


class Client(Protocol):
    """What `AdaptiveClient` needs."""

    async def infer(self, model: str, inputs: dict[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Named arrays in, named arrays out. Raises: Refused, Failed."""


class KserveClient:
    """KServe V2 over HTTP or gRPC, with tensors as raw bytes."""

    def __init__(self, url: str, protocol: str = "http", connections: int = 100) -> None:
        """Args: url, host:port. Raises: UserError for an unknown protocol or an absent tritonclient."""
        try:
            import tritonclient.grpc.aio as grpc
            import tritonclient.http.aio as http
        except ImportError as error:
            raise UserError("tritonclient is absent; pip install 'patchrank[serve]'") from error
        if protocol not in ("http", "grpc"):
            raise UserError(f"protocol {protocol!r}: unknown; choose http or grpc")
        self._library = http if protocol == "http" else grpc
        settings = {"conn_limit": connections} if protocol == "http" else {}
        self.wire = self._library.InferenceServerClient(url, **settings)

    async def infer(self, model: str, inputs: dict[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Named arrays in, named arrays out. Raises: Refused, Failed."""
        from tritonclient.utils import np_to_triton_dtype

        tensors = []
        for name, value in inputs.items():
            tensors.append(self._library.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype)))
            tensors[-1].set_data_from_numpy(value)
        wanted = [self._library.InferRequestedOutput(name) for name in outputs]
        try:
            result = await self.wire.infer(model, tensors, outputs=wanted)
        except Exception as error:  # each library under the wire has errors of its own
            raise (Refused if is_refusal(error) else Failed)(f"{model}: {error or type(error).__name__}") from error
        return {name: result.as_numpy(name) for name in outputs}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.wire.close()


def is_refusal(error: Any) -> bool:
    """Whether an error of the wire says that a queue is full."""
    status, message = getattr(error, "status", lambda: None)(), str(error)
    return status == "429" or any(words in message for words in _FULL)


@dataclass
class _Window:
    """What has been seen since `start`."""

    start: float
    latencies: list[float]
    refused: int = 0


class AdaptiveClient:
    """Asks for the variant that the policy's level names; every `window_s` the level is decided anew."""

    def __init__(
        self,
        client: Client,
        ladder: Sequence[str],
        policy: Policy,
        window_s: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: ladder, model names, the dearest first. Raises: UserError where policy and ladder do not fit."""
        if len(ladder) != policy.num_levels:
            raise UserError(f"policy of {policy.num_levels} levels for {len(ladder)} variants; give one for each")
        self.client, self.ladder, self.policy = client, list(ladder), policy
        self.level, self.switches = Level(), 0
        self._window_s, self._clock = window_s, clock
        self._window = _Window(clock(), [])
        self._inside: dict[int, float] = {}
        self._count = 0

    @property
    def model(self) -> str:
        """The variant that the next request asks for."""
        return self.ladder[self.level.level]

    async def infer(self, inputs: dict[str, np.ndarray], outputs: Sequence[str]) -> tuple[str, dict[str, np.ndarray]]:
        """The variant that answered, and its outputs. Raises: Refused, Failed."""
        self._decide()
        model, number, start = self.model, self._count, self._clock()
        self._count += 1
        self._inside[number] = start
        try:
            values = await self.client.infer(model, inputs, outputs)
            self._window.latencies.append(1000 * (self._clock() - start))
            return model, values
        except Refused:
            self._window.refused += 1
            raise
        finally:
            del self._inside[number]
            self._decide()

    def _decide(self) -> None:
        """Close the window if its time is up, and take the step that it asks for."""
        now = self._clock()
        if now - self._window.start < self._window_s:
            return
        # What still waits counts too: a server that answers nothing at all is the slowest of all.
        oldest = 1000 * (now - min(self._inside.values(), default=now))
        moment = Moment(latency_ms=max(high_quantile(self._window.latencies), oldest), refused=self._window.refused)
        before, self.level = self.level.level, step(self.policy, self.level, moment)
        self.switches += before != self.level.level
        self._window = _Window(now, [])


def high_quantile(values: Sequence[float], share: float = 0.9) -> float:
    """The value that `share` of `values` do not exceed; 0 of none."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else 0.0
