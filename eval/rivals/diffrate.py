"""DiffRate-style: blocks prune the least attended tokens, then merge the next ones, at rates that were searched.

Source: Chen et al. 2023, "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", sections 3.2
and 3.3, and its code (docs/rivals.md): between attention and MLP of every block but the first, patches are sorted by
class attention, log sizes included; the last ones are pruned, those before them join the most similar of the better
ones by the cosine of the tokens themselves: a plain mean, and a guest adds its size times that cosine to its host's.
Log sizes bias the attention. Both rates are free per block and found on a frozen tower under a MAC budget.
Deviations: the rates are searched by label-free feature cosine on a few train images (`eval.rivals.train`) instead of
gradients through relaxed rates and labels; without a search every block keeps the same share and merges half of what
it removes. One schedule serves every budget: its ratios are raised to one power. A guest of negative cosine adds
nothing to its host's size, whose logarithm must exist. In the last block of class pooling nothing leaves.

Letters: B batch, N patches present, K kept, R merged, C width.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.rivals.budget import class_token, nearest_setting
from eval.rivals.evit import class_row
from eval.rivals.tome import average_into
from eval.rivals.walk import Step, Walk, inner_layers
from patchrank.errors import UserError
from patchrank.tokens import gather_tokens, num_keep, rank
from patchrank.tower import TowerConfig, VisionTower

FILE = "diffrate.json"
_STEPS = 10_000


@dataclass(frozen=True)
class Schedule:
    """For each of `compressed_layers`: the ratio it keeps, and the share of what goes that is merged."""

    keep: tuple[float, ...]
    merged: tuple[float, ...]

    def to_dict(self) -> dict:
        return asdict(self)


def compressed_layers(config: TowerConfig) -> tuple[int, ...]:
    """The blocks that patches leave in: all but the first, and but one that computes the class row only."""
    return inner_layers(config)[1:] or inner_layers(config)


def equal(config: TowerConfig) -> Schedule:
    """The same ratio in every block, half of what goes merged."""
    num = len(compressed_layers(config))
    return Schedule((0.9,) * num, (0.5,) * num)


def read_schedule(path: Path, config: TowerConfig) -> Schedule:
    """A searched schedule. Raises: UserError for a file that is absent, damaged or of another depth."""
    path = path / FILE if path.is_dir() else path
    num = len(compressed_layers(config))
    try:
        found = json.loads(path.read_text())["schedule"]
        schedule = Schedule(tuple(found["keep"]), tuple(found["merged"]))
        fits = len(schedule.keep) == len(schedule.merged) == num
        fits = fits and all(0 < keep <= 1 for keep in schedule.keep) and math.prod(schedule.keep) < 1
        if not (fits and all(0 <= share <= 1 for share in schedule.merged)):
            raise ValueError(f"must hold {num} ratios in (0, 1] and {num} shares in [0, 1]")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no schedule for this tower ({error}); search one for this model") from error
    return schedule


def counts(config: TowerConfig, schedule: Schedule, share: float) -> dict[int, tuple[int, int]]:
    """{layer: (patches left, of these hosts of R merged: R)} with `share` of all patches left behind the last block."""
    power = math.log(share) / math.log(math.prod(schedule.keep))
    left, passed, found = config.num_patches, 1.0, {}
    for layer, keep, merged in zip(compressed_layers(config), schedule.keep, schedule.merged):
        passed *= keep**power
        target = num_keep(min(1.0, passed), config.num_patches)
        if target < left:
            found[layer] = target, round(merged * (left - target))
            left = target
    return found


def choice_macs(config: TowerConfig, counts: dict[int, tuple[int, int]]) -> dict[int, int]:
    """{layer: MACs}: the class row once more, and similarities of the merged to the kept."""
    width, patches, macs = config.width, config.num_patches, {}
    for layer, (K, R) in counts.items():
        macs[layer] = width * (width + config.num_prefix + patches + R * K)
        patches = K
    return macs


def join(kept_BKC: Tensor, size_BK: Tensor, guest_BRC: Tensor, size_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Each guest joins the most similar of the kept.

    Args: tokens (B, K, C) and (B, R, C), sizes (B, K) and (B, R) float. Returns: plain means (B, K, C), and sizes
    (B, K) to which a guest adds its own times its cosine.
    """
    cosine_BR, host_BR = (F.normalize(guest_BRC, dim=-1) @ F.normalize(kept_BKC, dim=-1).mT).max(-1)
    ones_BK, ones_BR = torch.ones_like(size_BK), torch.ones_like(size_BR)
    means_BKC, _ = average_into(kept_BKC, ones_BK, guest_BRC, ones_BR, host_BR)
    return means_BKC, size_BK.scatter_add(1, host_BR, size_BR * cosine_BR.clamp_min(0))


class DiffRate(Walk):
    """A tower that keeps K patches and merges R into them in each block of `counts`, {layer: (K, R)}."""

    def __init__(self, tower: VisionTower, counts: dict[int, tuple[int, int]]) -> None:
        left = {layer: K for layer, (K, _) in counts.items()}
        super().__init__(tower, left, choice_macs(tower.config, counts))
        self.counts = counts

    def reduce(self, step: Step) -> tuple[Tensor, Tensor]:
        prefix, (K, R) = step.num_prefix, self.counts[step.layer]
        patches_BNC, size_BL = step.x_BLC[:, prefix:], step.sizes()
        size_BN = size_BL[:, prefix:]
        order_BN = rank(class_row(step.block, step.before_BLC, step.key_BLC, step.size_BL)[:, prefix:])
        keep_BK, merge_BR = order_BN[:, :K], order_BN[:, K : K + R]
        kept_BKC, size_BK = gather_tokens(patches_BNC, keep_BK), size_BN.gather(1, keep_BK)
        if R:
            guest_BRC, guest_BR = gather_tokens(patches_BNC, merge_BR), size_BN.gather(1, merge_BR)
            kept_BKC, size_BK = join(kept_BKC, size_BK, guest_BRC, guest_BR)
        return torch.cat([step.x_BLC[:, :prefix], kept_BKC], dim=1), torch.cat([size_BL[:, :prefix], size_BK], dim=1)


def with_schedule(tower: VisionTower, macs: float, schedule: Schedule) -> DiffRate:
    """A schedule brought to a budget. Raises: UserError for a budget out of reach."""
    config = tower.config
    cost = lambda step: DiffRate(tower, counts(config, schedule, step / _STEPS)).macs  # noqa: E731
    return DiffRate(tower, counts(config, schedule, nearest_setting(config, macs, cost, _STEPS) / _STEPS))


def build_equal(tower: VisionTower, macs: float) -> DiffRate:
    """Equal rates at a budget. Raises: UserError without class token or for a budget out of reach."""
    class_token(tower, "diffrate-equal")
    return with_schedule(tower, macs, equal(tower.config))


def build(tower: VisionTower, macs: float, path: Path) -> DiffRate:
    """Searched rates at a budget. Raises: UserError as `build_equal` and `read_schedule`."""
    class_token(tower, "diffrate")
    return with_schedule(tower, macs, read_schedule(path, tower.config))
