"""How fast a run goes."""

import time

import torch

from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.cost import num_tokens
from patchrank.pretrain.learner import Learner


class Meter:
    """Pictures and tokens a second, and the teacher's share of the time, since the last reading."""

    def __init__(self, config: PretrainConfig, learner: Learner) -> None:
        self._config, self._learner, self._pictures = config, learner, 0
        self._tokens = num_tokens(config, config.row)
        self._since = time.monotonic()
        learner.teacher_seconds = 0.0

    def count(self) -> None:
        """One more step."""
        self._pictures += self._config.batch_size

    def read(self) -> dict[str, float]:
        """Rates since the last call. On a GPU the teacher's share is that of launching its kernels."""
        if self._config.device == "cuda":
            torch.cuda.synchronize()
        seconds = max(time.monotonic() - self._since, 1e-9)
        rate, share = self._pictures / seconds, self._learner.teacher_seconds / seconds
        self._pictures, self._since, self._learner.teacher_seconds = 0, time.monotonic(), 0.0
        return {"images_per_s": rate, "tokens_per_s": rate * self._tokens, "teacher_share": share}
