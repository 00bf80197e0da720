"""The ways of asking one server while it is measured, and reloading its models meanwhile."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Self

import numpy as np

from export.adaptive import Policy
from export.client import AdaptiveClient, KserveClient
from export.load_run import Ask
from export.load_truth import Truth
from export.serve_folder import ServedFolder

MODES = ("fixed", "adaptive")
"""Always the dearest variant, or what the policy says."""


class Traffic:
    """One server, by one or several clients that take turns."""

    def __init__(self, clients: list[KserveClient], folder: ServedFolder, truth: Truth) -> None:
        self.clients, self.truth = clients, truth
        self.ladder = [model.name for model in folder.variants]
        self.input = folder.default.record["inputs"][0]["name"]
        self._turn = 0

    async def infer(self, model: str, inputs: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        """As `KserveClient.infer`, by the client whose turn it is."""
        self._turn += 1
        return await self.clients[self._turn % len(self.clients)].infer(model, inputs, outputs)

    def ask(self, mode: str, target_ms: float) -> tuple[Ask, Callable[[], int]]:
        """How requests are asked in a mode, and how often it has changed the variant; a policy starts afresh."""
        policy = Policy(num_levels=len(self.ladder), target_ms=target_ms)
        adaptive = AdaptiveClient(self, self.ladder, policy)

        async def fixed_ask(image_BHW3: np.ndarray) -> tuple[str, dict[str, np.ndarray]]:
            return self.ladder[0], await self.infer(self.ladder[0], {self.input: image_BHW3}, self.truth.outputs)

        def adaptive_ask(image_BHW3: np.ndarray) -> Awaitable[tuple[str, dict[str, np.ndarray]]]:
            return adaptive.infer({self.input: image_BHW3}, self.truth.outputs)

        return (fixed_ask if mode == "fixed" else adaptive_ask), lambda: adaptive.switches


class Reloads:
    """While entered: one model after the other is loaded anew, every `every_s` seconds (0: never)."""

    def __init__(self, wire: Any, names: list[str], every_s: float) -> None:
        self.counts: dict[str, int] = {}
        self.failure: str | None = None
        self._wire, self._names, self._every_s = wire, names, every_s
        self._task: asyncio.Task | None = None

    async def _reload(self) -> None:
        """Triton leaves a model alone whose files and configuration are as before, so a parameter counts reloads."""
        number = 0
        while True:
            await asyncio.sleep(self._every_s)
            name = self._names[number % len(self._names)]
            config = await self._wire.get_model_config(name)
            config.setdefault("parameters", {})["reload"] = {"string_value": str(number)}
            await self._wire.load_model(name, config=json.dumps(config))
            self.counts[name] = self.counts.get(name, 0) + 1
            number += 1

    async def __aenter__(self) -> Self:
        if self._every_s:
            self._task = asyncio.create_task(self._reload())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            (ended,) = await asyncio.gather(self._task, return_exceptions=True)
            if not isinstance(ended, asyncio.CancelledError):
                self.failure = f"{type(ended).__name__}: {ended}"
