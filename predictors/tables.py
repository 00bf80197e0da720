"""The tables of what can be trained: scorers and compensation tokens, by name.

A new one is a class in its file and a row here; the CLI, the tests and the loading of saved towers read these tables.
"""

from typing import Any

from torch import nn

from patchrank.errors import UserError
from patchrank.salient import Salient
from patchrank.saving import Builders
from patchrank.scorers import SCORERS
from patchrank.tower import TowerConfig
from predictors.compensation import StaticTokens, SummaryTokens
from predictors.scorers import LinearScorer, MixerScorer, MlpScorer, TextSimilarityScorer

PREDICTORS: dict[str, type[nn.Module]] = {
    "linear": LinearScorer,
    "mlp": MlpScorer,
    "mixer": MixerScorer,
    "text-similarity": TextSimilarityScorer,
}
COMPENSATION: dict[str, type[nn.Module]] = {"static": StaticTokens, "summary": SummaryTokens}

BUILDERS: Builders = {**SCORERS, "salient": lambda grid, **options: Salient(**options), **PREDICTORS, **COMPENSATION}
"""Every row that a saved tower may name: (grid, **options) -> scorer, or module of added tokens."""


def row(table: dict[str, type[nn.Module]], flag: str, name: str) -> type[nn.Module]:
    """A row of a table. Raises: UserError for an unknown name."""
    if name not in table:
        raise UserError(f"--{flag} {name}: unknown; choose one of {', '.join(table)}")
    return table[name]


def scorer_options(config: TowerConfig, **options: Any) -> dict[str, Any]:
    """Options of a learned scorer for this tower, JSON-able: what `BUILDERS` needs beside the grid."""
    return {"width": config.width, "has_class": config.num_prefix > 0, **options}


def build_scorer(name: str, config: TowerConfig, **options: Any) -> nn.Module:
    """A learned scorer with fresh weights. Raises: UserError for an unknown name."""
    return row(PREDICTORS, "scorer", name)(config.grid, **scorer_options(config, **options))


def build_added(name: str, config: TowerConfig, **options: Any) -> nn.Module:
    """A compensation module with fresh weights. Raises: UserError for an unknown name."""
    return row(COMPENSATION, "added", name)(config.grid, width=config.width, **options)
