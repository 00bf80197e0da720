"""Measured milliseconds of every stage on this machine, at a few token counts, with straight lines between.

Letters: B batch, N patches, K kept, L tokens, C width.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from patchrank.pruned import PrunedTower, Scorer, State, start_state
from patchrank.spec import PruneSpec
from patchrank.tower import VisionTower

SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1)
"""Shares of the patches at which stages are timed."""
CUT_KEEPS = (0.9, 0.5)
"""Ratios at which cuts are timed; others lie on the line through both."""
_WARM = 2


@dataclass(frozen=True, kw_only=True)
class TimeCosts:
    """Milliseconds per batch of `batch_size` images; each list belongs to `patches`, rising counts."""

    batch_size: int
    num_prefix: int
    patches: tuple[int, ...]
    embed: float
    pool: float
    """Pooling and projection at all patches; hardly anything."""
    key: tuple[float, ...]
    plain: tuple[float, ...]
    """Attention half of a block."""
    biased: tuple[float, ...]
    """The same with sizes as a bias."""
    feed: tuple[float, ...]
    """MLP half."""
    row: tuple[float, ...]
    """The last block for the class row."""
    cut_high: tuple[float, ...]
    """A cut that keeps the larger ratio of CUT_KEEPS, keys at hand."""
    cut_low: tuple[float, ...]

    def _at(self, column: tuple[float, ...], num_patches: float) -> float:
        return float(np.interp(num_patches, self.patches, column))

    def start(self) -> float:
        return self.embed

    def keys(self, num_tokens: int) -> float:
        return self._at(self.key, num_tokens - self.num_prefix)

    def cut(self, num_patches: int, K: int) -> float:
        high, low = (self._at(column, num_patches) for column in (self.cut_high, self.cut_low))
        place = (CUT_KEEPS[0] - K / num_patches) / (CUT_KEEPS[0] - CUT_KEEPS[1])
        return max(0.0, high + place * (low - high))

    def attend(self, num_tokens: int, sized: bool) -> float:
        return self._at(self.biased if sized else self.plain, num_tokens - self.num_prefix)

    def mlp(self, num_tokens: int) -> float:
        return self._at(self.feed, num_tokens - self.num_prefix)

    def last(self, num_tokens: int, sized: bool) -> float:
        return self._at(self.row, num_tokens - self.num_prefix)

    def head(self, num_tokens: int) -> float:
        return self.pool

    def to_dict(self) -> dict:
        """JSON-able form."""
        return asdict(self)


def milliseconds(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Fastest time of each call in milliseconds: what the machine does when nobody else uses it.

    The calls take turns, so that a busy minute hits all of them.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(_WARM + rounds):
        for name, call in calls.items():
            _wait(device)
            began = time.perf_counter()
            call()
            _wait(device)
            if turn >= _WARM:
                taken[name].append(1000 * (time.perf_counter() - began))
    return {name: min(values) for name, values in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cutter(tower: VisionTower, manner: PruneSpec, scorer: Scorer, state: State, keep: float) -> Callable[[], object]:
    """One cut of a batch inside a block, keys at hand, to K = keep * N."""
    pruned, key_BLC = PrunedTower(tower, manner, scorer), state.block.keys(state.x_BLC)
    inside = replace(state, entry_BPC=state.x_BLC[:, : state.num_prefix], key_BLC=key_BLC)
    metric_BNM = state.block.mean_head(key_BLC[:, state.num_prefix :])
    K = max(1, round(keep * metric_BNM.shape[1]))
    return lambda: pruned.cut(inside, K, metric_BNM, None)


def _calls(tower: VisionTower, manner: PruneSpec, scorer: Scorer, x_BLC: Tensor) -> dict[str, Callable[[], object]]:
    """Every stage that depends on the number of tokens, on these tokens."""
    block, state = tower.blocks[0], start_state(tower, x_BLC, 0)
    bias_B11L = x_BLC.new_zeros(x_BLC.shape[0], 1, 1, x_BLC.shape[1])
    return {
        "key": lambda: block.keys(x_BLC),
        "plain": lambda: block.attend(x_BLC),
        "biased": lambda: block.attend(x_BLC, bias_B11L),
        "feed": lambda: block.mlp(x_BLC),
        "row": lambda: block.mlp(block.attend_rows(x_BLC, 1)) if state.num_prefix else block(x_BLC),
        "cut_high": _cutter(tower, manner, scorer, state, CUT_KEEPS[0]),
        "cut_low": _cutter(tower, manner, scorer, state, CUT_KEEPS[1]),
    }


@torch.inference_mode()
def measure(
    tower: VisionTower, manner: PruneSpec, scorer: Scorer, *, batch_size: int, rounds: int = 9, quiet: bool = True
) -> TimeCosts:
    """Time the stages of one batch on the tower's device; `manner` as in `MacCosts`, `scorer` asked at every cut.

    The blocks are taken as alike.
    """
    config, device = tower.config, tower.position.device
    generator = torch.Generator().manual_seed(0)
    image_BCHW = torch.randn(batch_size, 3, *config.image_size, generator=generator).to(device)
    x_BLC = tower.embed(image_BCHW)
    patches = sorted({max(2, round(share * config.num_patches)) for share in SHARES})
    ends = {"embed": lambda: tower.embed(image_BCHW), "pool": lambda: tower.head(x_BLC)}
    found = milliseconds(ends, rounds, device)
    columns: dict[str, list[float]] = {}
    for num in tqdm(patches, unit=" token counts", desc="timing", disable=quiet):
        calls = _calls(tower, manner, scorer, x_BLC[:, : config.num_prefix + num].contiguous())
        for name, value in milliseconds(calls, rounds, device).items():
            columns.setdefault(name, []).append(value)
    return TimeCosts(
        batch_size=batch_size,
        num_prefix=config.num_prefix,
        patches=tuple(patches),
        embed=found["embed"],
        pool=found["pool"],
        **{name: tuple(column) for name, column in columns.items()},
    )
