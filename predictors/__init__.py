"""Learned scorers, the tokens that make up for removed patches, their losses and their training.

Stands on `patchrank`, under `export` and `eval`. `load_pruned(path)` reads what the commands write:

    python -m predictors.train        a scorer for a frozen tower
    python -m predictors.calibrate    its LayerNorms and biases behind the cut, re-fitted
"""

from predictors.artifact import load_pruned, read_training
from predictors.tables import COMPENSATION, PREDICTORS

__all__ = ["COMPENSATION", "PREDICTORS", "load_pruned", "read_training"]
