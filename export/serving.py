"""What is exported: uint8 pictures in, unit features (and answers over a class list) out, around one `PrunedTower`.

The wrapper adds no selection of its own: scores, order, gather and fold are the core's. It only puts normalisation
before the walk, an answer behind it, and hands the kept positions out.

Letters: B batch, H rows, W columns, K kept, D feature, Y classes, T best answers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.resize import Resize
from patchrank.preprocess import Preprocess
from patchrank.pruned import Cut, PrunedTower

NUM_BEST = 5


@dataclass(frozen=True, kw_only=True)
class Classes:
    """A class list that is baked into a graph."""

    names: tuple[str, ...]
    weight_DY: Tensor
    """One column per class, float32."""
    bias_Y: Tensor | None = None
    scale: float = 1.0
    """Factor on the product before softmax."""
    unit_features: bool = True
    """Whether the columns are compared with normalised features (text) or with features as they are (a head)."""


class Pixels(nn.Module):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), normalised in the order of operations of `Preprocess`.

    Channels move to the front before anything is computed: arithmetic along an innermost axis of three is slow. They
    are cast before that, since TensorRT moves no bytes. Pictures have the model's size, or the fixed size `source` and
    are resized here.
    """

    def __init__(self, preprocess: Preprocess, source: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.image_size = preprocess.image_size if source is None else source
        self.resize = None if source is None else Resize(preprocess, source)
        self.register_buffer("mean_311", torch.tensor(preprocess.mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std_311", torch.tensor(preprocess.std, dtype=torch.float32)[:, None, None])

    def forward(self, image_BHW3: Tensor) -> Tensor:
        x_B3HW = image_BHW3.float().permute(0, 3, 1, 2) if self.resize is None else self.resize(image_BHW3)
        return (x_B3HW / 255 - self.mean_311) / self.std_311


class Answer(nn.Module):
    """Feature (B, D) -> unit feature, and with classes logits (B, Y), probabilities (B, Y), best T of both kinds.

    Stays float32 in every precision: a logit is a cosine times about 100.
    """

    def __init__(self, classes: Classes | None) -> None:
        super().__init__()
        self.classes = classes
        if classes is not None:
            self.register_buffer("weight_DY", classes.weight_DY.float() * classes.scale)
            self.register_buffer("bias_Y", None if classes.bias_Y is None else classes.bias_Y.float() * classes.scale)

    def forward(self, feature_BD: Tensor) -> tuple[Tensor, ...]:
        feature_BD = feature_BD.float()
        unit_BD = F.normalize(feature_BD, dim=-1)
        if self.classes is None:
            return (unit_BD,)
        logit_BY = (unit_BD if self.classes.unit_features else feature_BD) @ self.weight_DY
        logit_BY = logit_BY if self.bias_Y is None else logit_BY + self.bias_Y
        probability_BY = logit_BY.softmax(-1)
        best_BT, index_BT = probability_BY.topk(min(NUM_BEST, len(self.classes.names)), dim=-1)
        return unit_BD, logit_BY, probability_BY, best_BT, index_BT


def kept_positions(cuts: list[Cut]) -> list[Tensor]:
    """Original positions (B, K) int64 of the patches that each cut left, best first."""
    positions: list[Tensor] = []
    for cut in cuts:
        positions.append(positions[-1].gather(1, cut.keep_BK) if positions else cut.keep_BK)
    return positions


class ServingGraph(nn.Module):
    """uint8 (B, H, W, 3) at the model's size -> outputs in the order of `output_names`; only the batch is free.

    Args: source, another fixed size (H, W) of the pictures, which the graph then resizes itself.
    """

    input_name = "image"

    def __init__(
        self,
        pruned: PrunedTower,
        preprocess: Preprocess,
        classes: Classes | None = None,
        source: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.pixels = Pixels(preprocess, source)
        self.pruned = pruned
        self.answer = Answer(classes)

    @property
    def classes(self) -> Classes | None:
        """The baked class list."""
        return self.answer.classes

    @property
    def output_names(self) -> list[str]:
        """feature; with classes logits, probabilities, top5_probability, top5_index; `kept` positions of the last cut,
        and `kept_at_<layer>` of the cuts before it."""
        names = ["feature"]
        if self.classes is not None:
            names += ["logits", "probabilities", "top5_probability", "top5_index"]
        layers = [layer for layer, _ in self.pruned.spec.cuts]
        return names + [f"kept_at_{layer}" for layer in layers[:-1]] + ["kept"] * bool(layers)

    def example(self, batch: int = 2) -> Tensor:
        """An input to trace with; never a batch of 1, which tracing takes for a constant."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (batch, *self.pixels.image_size, 3), dtype=torch.uint8, generator=generator)

    def forward(self, image_BHW3: Tensor) -> tuple[Tensor, ...]:
        feature_BD, cuts = self.pruned.features_and_cuts(self.pruned.tower.embed(self.pixels(image_BHW3)), 0)
        return (*self.answer(feature_BD), *kept_positions(cuts))
