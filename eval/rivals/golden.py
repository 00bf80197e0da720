"""The golden oracle: every image is searched for the ranking that hurts its own feature least, then pruned by it.

No method: the search reads the unpruned feature and costs hundreds of forward passes, which are not counted. It says
how much a better ranking could still give under the same one cut.

Letters: B batch, N patches.
"""

import torch
from torch import Tensor

from eval.rivals.budget import Rival
from eval.rivals.covering import one_cut
from patchrank.macs import pruned_macs
from patchrank.pruned import PrunedTower
from patchrank.scorers import SCORERS
from patchrank.search.criteria import Target, build_damage
from patchrank.search.strategies import DEFAULT, Options, strategy_by_name
from patchrank.search.variants import prepare
from patchrank.spec import PruneSpec
from patchrank.tower import VisionTower


def golden_scores(tower: VisionTower, image_BCHW: Tensor, spec: PruneSpec, seed: int = 0) -> Tensor:
    """Scores (B, N) float32 of every image's own search; an image's scores do not depend on its batch."""
    search, scores = strategy_by_name(DEFAULT), []
    with torch.inference_mode(False), torch.no_grad():
        for image_CHW in image_BCHW.clone():
            variants = prepare(tower, image_CHW, spec)
            damage = build_damage("preservation", Target(variants.dense_D))
            generator = torch.Generator().manual_seed(seed)
            scores.append(search.run(variants, damage, Options(), generator).score_N.float())
    return torch.stack(scores).to(image_BCHW.device)


class Golden(Rival):
    """One cut by each image's own golden ranking; `score_BN`, where it is known already, spares the search."""

    def __init__(self, tower: VisionTower, spec: PruneSpec) -> None:
        super().__init__(tower, pruned_macs(tower.config, spec))
        self.pruned = PrunedTower(tower, spec, SCORERS["random"](tower.config.grid))

    def forward(self, image_BCHW: Tensor, score_BN: Tensor | None = None) -> Tensor:
        if score_BN is None and self.saves:
            score_BN = golden_scores(self.tower, image_BCHW, self.pruned.spec)
        return self.pruned(image_BCHW, score_BN)

    @property
    def saves(self) -> bool:
        """Whether any patch goes, so that the ranking matters."""
        return self.pruned.spec.cuts[0][1] < 1.0


def build(tower: VisionTower, macs: float, *, rest: str) -> Golden:
    """One cut at a budget, drop or fold. Raises: UserError for a budget out of reach."""
    return Golden(tower, one_cut(tower.config, macs, rest))
