"""Batches drawn one part ahead, in a thread beside the training."""

from concurrent.futures import Future, ThreadPoolExecutor

from patchrank.pretrain.batches import Batch, Batches


class Ahead:
    """`Batches.at`, with the next part already in the making.

    Pictures are only drawn ahead where the next step's difficulty is known, that is once it is 1.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches, self._config = batches, batches.config
        self._thread = ThreadPoolExecutor(1)
        self._next: tuple[tuple[int, int], Future[Batch]] | None = None

    def at(self, step: int, difficulty: float = 1.0, part: int = 0) -> Batch:
        """The same batch that `Batches.at` gives."""
        waiting, self._next = self._next, None
        drawn = None
        if waiting is not None:
            # a part that nobody asked for is waited for as well: a stream has one reader at a time
            drawn = waiting[1].result()
        fits = drawn is not None and waiting[0] == (step, part) and difficulty >= 1.0
        batch = drawn if fits else self._batches.at(step, difficulty, part)
        after = (step, part + 1) if part + 1 < self._config.accumulate else (step + 1, 0)
        if difficulty >= 1.0 and after[0] < self._config.num_steps:
            self._next = after, self._thread.submit(self._batches.at, after[0], 1.0, after[1])
        return batch
