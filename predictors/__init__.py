"""Learned scorers, the tokens that make up for removed patches, their losses and their training.

Stands on `patchrank`, under `export` and `eval`. `load_pruned(path)` reads what the commands write:

    python -m predictors.train        a scorer for a frozen tower
    python -m predictors.calibrate    its LayerNorms and biases behind the cut, re-fitted
    python -m predictors.schedule     cuts and counts for a budget in MACs or milliseconds
    python -m predictors.prompt       prompt tuning, dense and pruned, as in Patch Ranking's Table 5
"""

from predictors.artifact import load_pruned, read_training
from predictors.tables import COMPENSATION, PREDICTORS

__all__ = ["COMPENSATION", "PREDICTORS", "load_pruned", "read_training"]
