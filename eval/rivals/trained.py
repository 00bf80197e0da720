"""What `predictors.train` and `predictors.calibrate` saved, as a row: the same scorer and tokens at a budget."""

from pathlib import Path

from torch import Tensor

from eval.rivals.budget import Rival
from patchrank.checkpoints.weights import weights_hash
from patchrank.errors import UserError
from patchrank.pruned import PrunedTower
from patchrank.tower import VisionTower
from predictors import load_pruned, read_training
from predictors.costs import cost_with, learned_macs
from predictors.objective import with_spec
from predictors.schedules import within


class Trained(Rival):
    """A saved pruned tower and its MACs, scorer, metric and added tokens included."""

    def __init__(self, pruned: PrunedTower) -> None:
        super().__init__(pruned.tower, learned_macs(pruned.config, pruned.spec, pruned.scorer, pruned.added))
        self.pruned = pruned

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.pruned(image_BCHW)


def build(tower: VisionTower, macs: float, path: Path) -> Trained:
    """The saved tower with the most patches that a budget allows at its own cuts.

    A calibrated one holds re-fitted weights; its source must be the given tower.
    Raises: UserError for a folder that cannot be read or was trained for other weights, or a budget out of reach.
    """
    source = read_training(path)["source_weights_hash"]
    if source != weights_hash(tower):
        raise UserError(f"{path}: was trained for weights {source[:12]}; train it for this model")
    pruned = load_pruned(path, tower.position.device)
    cost = cost_with(pruned.scorer, pruned.added, pruned.spec.num_added)
    return Trained(with_spec(pruned, within(pruned.spec, macs, pruned.config, cost)).eval())
