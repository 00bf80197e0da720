"""How fast a run goes."""

import time
from dataclasses import replace

import torch

from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.cost import num_tokens
from patchrank.pretrain.learner import Learner


class Meter:
    """Pictures and tokens a second, and the teacher's share of the time, since the last reading."""

    def __init__(self, config: PretrainConfig, learner: Learner) -> None:
        self._config, self._learner, self._pictures = config, learner, 0
        self._tokens = 0
        self._since = time.monotonic()
        learner.teacher_seconds = 0.0

    def count(self, step: int) -> None:
        """Step `step` is done, with the views that it shows."""
        config, row = self._config, self._config.row
        views = row.views_at(step, config.num_steps, config.cheap_start, config.cheap_keep, config.tuning)
        self._pictures += config.batch_size
        self._tokens += config.batch_size * num_tokens(config, replace(row, views=views))

    def skip(self, seconds: float) -> None:
        """A pause that is no training."""
        self._since += seconds

    def read(self) -> dict[str, float]:
        """Rates since the last call. On a GPU the teacher's share is that of launching its kernels."""
        if self._config.device == "cuda":
            torch.cuda.synchronize()
        seconds = max(time.monotonic() - self._since, 1e-9)
        images, tokens = self._pictures / seconds, self._tokens / seconds
        share = self._learner.teacher_seconds / seconds
        self._pictures, self._tokens, self._learner.teacher_seconds = 0, 0, 0.0
        self._since = time.monotonic()
        return {"images_per_s": images, "tokens_per_s": tokens, "teacher_share": share}
