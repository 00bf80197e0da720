"""The loss of a recipe: a weighted sum of terms, each a module over what one step's passes made (`Encoded`).

    objectives = Objectives({"clip": (1.0, {}), "simclr": (1.0, {"hidden": 256})}, Widths.of(pair.tower, pair.text))
    losses = objectives(Encoded(feature_VBD=..., text_BD=..., scale=..., ...))   # {"loss": ..., "clip": ..., ...}

OBJECTIVES is the table; a new objective is a module in `losses/` and a row here. Each says in `needs` which fields of
`Encoded` it reads; one with a `followed` module wants the teacher to keep an EMA of it (`Objectives.followed`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from patchrank.errors import UserError
from patchrank.pretrain.losses.byol import ByolObjective
from patchrank.pretrain.losses.contrastive import ClipContrastive, SiglipContrastive, caption_ids
from patchrank.pretrain.losses.distill import DistillObjective
from patchrank.pretrain.losses.encoded import Encoded
from patchrank.pretrain.losses.mlm import MlmObjective
from patchrank.pretrain.losses.several_positives import contrastive_loss, distinct, positives
from patchrank.pretrain.losses.simclr import SimclrObjective
from patchrank.text import TextTower
from patchrank.tower import VisionTower

__all__ = [
    "OBJECTIVES", "Encoded", "Objectives", "Widths", "caption_ids", "contrastive_loss", "distinct", "positives",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Sizes of the towers that heads and decoders have to fit."""

    image: int
    """Width of the image tower, the feature before the projection."""
    image_heads: int
    num_patches: int
    text: int
    text_heads: int

    @classmethod
    def of(cls, tower: VisionTower, text: TextTower) -> "Widths":
        """Of these towers."""
        return cls(
            image=tower.config.width,
            image_heads=tower.config.num_heads,
            num_patches=tower.config.num_patches,
            text=text.config.width,
            text_heads=text.config.num_heads,
        )


OBJECTIVES: dict[str, Callable[..., nn.Module]] = {
    "clip": ClipContrastive,
    "siglip": SiglipContrastive,
    "simclr": SimclrObjective,
    "byol": ByolObjective,
    "distill": DistillObjective,
    "mlm": MlmObjective,
}
"""Name -> builder (Widths, **options) -> module: Encoded -> scalar float32."""


class Objectives(nn.Module):
    """Weighted sum of rows of OBJECTIVES; a term of weight 0 is not built.

    Args: terms: name -> (weight, options); widths. Raises: UserError for an unknown name, or if nothing is left.
    """

    def __init__(self, terms: Mapping[str, tuple[float, Mapping[str, Any]]], widths: Widths) -> None:
        super().__init__()
        unknown = [name for name in terms if name not in OBJECTIVES]
        if unknown:
            raise UserError(f"objective {unknown[0]}: unknown; choose one of {', '.join(OBJECTIVES)}")
        self.weights = {name: weight for name, (weight, _) in terms.items() if weight != 0}
        if not self.weights:
            raise UserError(f"objectives {', '.join(terms) or '(none)'}: at least one needs a weight that is not 0")
        self.terms = nn.ModuleDict({name: OBJECTIVES[name](widths, **terms[name][1]) for name in self.weights})

    @property
    def needs(self) -> frozenset[str]:
        """All fields of `Encoded` that some term reads, as the terms' `needs` name them."""
        return frozenset().union(*(term.needs for term in self.terms.values()))

    @property
    def followed(self) -> dict[str, nn.Module]:
        """Modules the teacher has to follow, by objective name; its copies are `Encoded.teacher_heads`."""
        return {name: term.followed for name, term in self.terms.items() if hasattr(term, "followed")}

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """Every term by name, not weighted, and their weighted sum as "loss"."""
        return self.with_total({name: term(encoded) for name, term in self.terms.items()})

    def with_total(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms by name, and their weighted sum as "loss"."""
        return {"loss": sum(weight * found[name] for name, weight in self.weights.items()), **found}
