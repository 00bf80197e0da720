"""The methods of a suite: every row of the rivals' table at every budget, and why a row is not there.

Letters: B batch, N patches.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from eval.features import Method
from eval.measuring import Unreached
from eval.records import DENSE
from eval.rivals import OURS, RIVALS, NotGiven, build
from eval.rivals.golden import Golden, golden_scores
from patchrank.errors import UserError
from patchrank.macs import dense_macs
from patchrank.tower import VisionTower


@dataclass
class Searched(threading.local):
    """Rankings of the batch that a thread searched last, so that all budgets of an oracle share one search."""

    image_BCHW: Tensor | None = None
    score_BN: Tensor | None = None

    def scores(self, image_BCHW: Tensor, search: Callable[[Tensor], Tensor]) -> Tensor:
        """Scores (B, N) of the batch, searched anew if it is another one."""
        if self.image_BCHW is None or not torch.equal(self.image_BCHW, image_BCHW):
            self.score_BN = search(image_BCHW)
            self.image_BCHW = image_BCHW
        return self.score_BN


class SharedOracle(nn.Module):
    """A golden row whose search the other budgets of its family have made, or will use."""

    def __init__(self, golden: Golden, searched: Searched) -> None:
        super().__init__()
        self.golden = golden
        self.searched = searched

    def forward(self, image_BCHW: Tensor) -> Tensor:
        tower, spec = self.golden.tower, self.golden.pruned.spec
        score_BN = self.searched.scores(image_BCHW, lambda image: golden_scores(tower, image, spec))
        return self.golden(image_BCHW, score_BN)


@dataclass
class Built:
    """What can be measured, dense first, and what cannot."""

    methods: list[Method]
    unreached: list[Unreached] = field(default_factory=list)


def is_oracle(name: str) -> bool:
    """Whether a row of the table searches every image with the unpruned feature in hand."""
    return name in RIVALS and RIVALS[name].family == "oracle"


def build_all(tower: VisionTower, names: Sequence[str], budgets: Sequence[float], files: Mapping[str, Path]) -> Built:
    """Every row of `names` at every budget; a row without its file, or out of reach, is listed with the reason.

    Raises: UserError if our own method cannot meet a budget.
    """
    found = Built([Method(name=DENSE, module=tower, image_macs=dense_macs(tower.config))])
    searched: dict[str, Searched] = {}
    for macs in budgets:
        for name in names:
            try:
                rival = build(name, tower, macs, files).eval()
            except UserError as error:
                if name == OURS:
                    raise
                reason = str(error).removeprefix(f"{name}: ") if isinstance(error, NotGiven) else str(error)
                found.unreached.append(Unreached(method=name, macs=macs, reason=reason))
                continue
            image_macs = rival.macs
            if isinstance(rival, Golden):
                rival = SharedOracle(rival, searched.setdefault(name, Searched()))
            found.methods.append(Method(name=name, macs=macs, module=rival, image_macs=image_macs))
    return found
