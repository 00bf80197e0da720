"""Dynamic batching: requests that wait for the same model are computed in one call.

The first request of a batch waits `max_delay_s` for others; while the processor is busy, more gather by themselves.
All models share one admission counter: what would make more than `max_queue` rows wait is refused at once, so waiting
time is bounded, and a client learns of overload while it can still do something.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]
"""Inputs of a batch -> all outputs; called in a thread."""


class Overloaded(Exception):
    """The queue is full; answered with status 429."""


class Stopping(Exception):
    """The server takes no more work; answered with status 503."""


@dataclass
class Admission:
    """Rows that are inside the server, over all models, from arrival to answer; or bytes of bodies."""

    max_queue: int
    unit: str = "images"
    rows: int = 0
    closed: bool = False

    def enter(self, rows: int) -> None:
        """Raises: Overloaded, or Stopping once closed; then nothing was counted."""
        if self.closed:
            raise Stopping("the server is stopping")
        if self.rows + rows > self.max_queue:
            raise Overloaded(
                f"{self.rows} {self.unit} are waiting, {rows} more would exceed {self.max_queue}; try later"
            )
        self.rows += rows

    def leave(self, rows: int) -> None:
        """The counterpart of `enter`."""
        self.rows -= rows


@dataclass
class _Waiting:
    inputs: Arrays
    rows: int
    arrived: float
    done: asyncio.Future


@dataclass
class Batcher:
    """`await batcher(inputs)` gives the outputs of these rows, whoever shares their call."""

    run: Run
    max_batch: int
    max_delay_s: float
    executor: Executor
    slots: asyncio.Semaphore
    """As many as the executor has threads: a batch is closed only when it can start."""
    seen: Callable[[int, float], None] = lambda rows, seconds: None
    """Told of every call: rows and seconds."""
    _queue: deque[_Waiting] = field(default_factory=deque)
    _arrival: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task | None = None
    _running: set[asyncio.Task] = field(default_factory=set)
    """Held here, for a loop alone may lose a task that nobody awaits."""

    async def __call__(self, inputs: Arrays) -> Arrays:
        """Arrays with one first axis, at most `max_batch` long -> all outputs for these rows.

        Raises: whatever `run` raised.
        """
        loop = asyncio.get_running_loop()
        rows = len(next(iter(inputs.values())))
        waiting = _Waiting(inputs, rows, loop.time(), loop.create_future())
        self._queue.append(waiting)
        self._arrival.set()
        return await waiting.done

    def start(self) -> None:
        """Begin to serve; needs a running loop."""
        self._task = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        """Compute what still waits, then end."""
        while self._queue:
            await asyncio.sleep(0.01)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, *self._running, return_exceptions=True)

    async def _serve(self) -> None:
        while True:
            await self._gather_first()
            await self.slots.acquire()
            batch = self._take()
            if not batch:
                self.slots.release()
                continue
            task = asyncio.create_task(self._compute(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _gather_first(self) -> None:
        """Return when a batch is full, or its first request has waited long enough."""
        while not self._queue:
            self._arrival.clear()
            await self._arrival.wait()
        end = self._queue[0].arrived + self.max_delay_s
        while sum(waiting.rows for waiting in self._queue) < self.max_batch:
            left = end - asyncio.get_running_loop().time()
            if left <= 0:
                return
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left)
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        """The oldest requests that fit into one call; those whose caller went away are dropped."""
        batch, rows = [], 0
        while self._queue and rows + self._queue[0].rows <= self.max_batch:
            waiting = self._queue.popleft()
            if not waiting.done.cancelled():
                batch.append(waiting)
                rows += waiting.rows
        return batch

    async def _compute(self, batch: list[_Waiting]) -> None:
        try:
            await self._answer(batch)
        finally:
            self.slots.release()

    async def _answer(self, batch: list[_Waiting]) -> None:
        """Run a batch and hand its rows out; if it fails, each request alone, so that only the guilty one fails."""
        loop = asyncio.get_running_loop()
        try:
            joined = {name: _join([waiting.inputs[name] for waiting in batch]) for name in batch[0].inputs}
            start = loop.time()
            outputs = await loop.run_in_executor(self.executor, self.run, joined)
        except Exception as error:
            for waiting in batch:
                if len(batch) > 1:
                    await self._answer([waiting])
                elif not waiting.done.done():
                    waiting.done.set_exception(error)
            return
        self.seen(sum(waiting.rows for waiting in batch), loop.time() - start)
        first = 0
        for waiting in batch:
            rows = slice(first, first + waiting.rows)
            first += waiting.rows
            if not waiting.done.done():
                waiting.done.set_result({name: value[rows] for name, value in outputs.items()})


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
