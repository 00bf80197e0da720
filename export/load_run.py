"""One stretch of load: requests at Poisson times whatever the server does, every answer compared, nothing forgotten.

Latency counts from the moment a request was due, not from when it was sent, so a client that falls behind does not hide
a slow server (coordinated omission).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np

from export.client import Failed, Refused
from export.load_truth import Truth

Ask = Callable[[np.ndarray], Awaitable[tuple[str, dict[str, np.ndarray]]]]
"""Images (B, H, W, 3) uint8 -> the model that answered, and its outputs."""


@dataclass(frozen=True)
class Arrival:
    """One request to be."""

    due_s: float
    rows: np.ndarray
    """Numbers of its images."""


@dataclass
class Seen:
    """What became of the requests of one stretch."""

    latencies_ms: list[float] = field(default_factory=list)
    answered: int = 0
    refused: int = 0
    lost: int = 0
    wrong: int = 0
    images: Counter = field(default_factory=Counter)
    """Images answered, by model."""
    right: int = 0
    """Images whose best class is the label."""
    dense_right: int = 0
    """The same for the dearest variant's local answers."""
    same: int = 0
    """Images whose best class is that of the dearest variant."""
    errors: Counter = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def requests(self) -> int:
        return self.answered + self.refused + self.lost


def arrivals(
    rate: float, seconds: float, batches: tuple[int, ...], num_images: int, rng: np.random.Generator
) -> list[Arrival]:
    """Poisson arrivals of `rate` images per second; sizes are drawn from `batches`, images at random."""
    due, found = 0.0, []
    mean = sum(batches) / len(batches)
    while True:
        due += rng.exponential(mean / rate)
        if due >= seconds:
            return found
        found.append(Arrival(due, rng.integers(0, num_images, rng.choice(batches))))


async def drive(plan: list[Arrival], ask: Ask, truth: Truth, dense: str, max_inside: int, patience_s: float) -> Seen:
    """Send a plan, wait at most `patience_s` for what is late, and count everything once.

    Args: dense, the name of the dearest variant; max_inside, requests in flight above which one counts as refused
    unsent.
    """
    seen = Seen()
    inside: set[asyncio.Task] = set()
    tasks: list[asyncio.Task] = []
    start = time.monotonic()
    for arrival in plan:
        wait = start + arrival.due_s - time.monotonic()
        await asyncio.sleep(max(0.0, wait))
        if len(inside) >= max_inside:
            seen.refused += 1
            seen.errors["unsent: too many requests in flight"] += 1
            continue
        task = asyncio.create_task(_one(arrival, start, ask, truth, dense, seen))
        tasks.append(task)
        inside.add(task)
        task.add_done_callback(inside.discard)
    if inside:
        await asyncio.wait(set(inside), timeout=patience_s)
    for task in list(inside):
        seen.lost += 1
        seen.errors[f"no answer within {patience_s:g} s after the end"] += 1
        task.cancel()
    for task in tasks:
        if task.done() and not task.cancelled():
            task.result()  # a mistake of ours is not an answer of the server's
    seen.seconds = time.monotonic() - start
    return seen


async def _one(arrival: Arrival, start: float, ask: Ask, truth: Truth, dense: str, seen: Seen) -> None:
    try:
        model, values = await ask(truth.image_BHW3[arrival.rows])
    except Refused as error:
        seen.refused += 1
        seen.errors[_short(error)] += 1
        return
    except Failed as error:
        seen.lost += 1
        seen.errors[_short(error)] += 1
        return
    seen.answered += 1
    seen.latencies_ms.append(1000 * (time.monotonic() - start - arrival.due_s))
    seen.images[model] += len(arrival.rows)
    seen.wrong += truth.is_wrong(model, arrival.rows, values)
    if truth.best_B is not None:
        best, dense_best = values["top5_index"][:, 0], truth.best_B[dense][arrival.rows]
        seen.same += int((best == dense_best).sum())
        if truth.label_B is not None:
            seen.right += int((best == truth.label_B[arrival.rows]).sum())
            seen.dense_right += int((dense_best == truth.label_B[arrival.rows]).sum())


def _short(error: Exception) -> str:
    """An error's message without what is different in every request."""
    return " ".join("#" if any(c.isdigit() for c in word) else word for word in str(error).split())[:120]


async def capacity(ask: Ask, truth: Truth, seconds: float, inside: int) -> float:
    """Images per second that a server answers while `inside` callers each wait for their answer.

    Raises: Failed if nothing was answered.
    """
    end, count = time.monotonic() + seconds, 0

    async def caller(number: int) -> None:
        nonlocal count
        while time.monotonic() < end:
            try:
                await ask(truth.image_BHW3[[number % len(truth.ids)]])
                count += 1
            except Refused:
                await asyncio.sleep(0.01)

    start = time.monotonic()
    await asyncio.gather(*(caller(number) for number in range(inside)))
    if not count:
        raise Failed("no request was answered")
    return count / (time.monotonic() - start)


async def idle_ms(ask: Ask, truth: Truth, calls: int = 12) -> float:
    """Median latency of one image while nothing else is asked; the first two calls do not count."""
    found = []
    for number in range(calls):
        start = time.monotonic()
        await ask(truth.image_BHW3[[number % len(truth.ids)]])
        found.append(1000 * (time.monotonic() - start))
    return float(np.median(found[2:]))
