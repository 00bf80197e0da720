"""Rows of the prompt table and how they are printed; accuracy on test images, seeds and paired intervals.

Letters: S seeds, I images.
"""

from dataclasses import asdict, dataclass
from statistics import mean, stdev

import torch
from torch import Tensor

from patchrank.metrics import paired_interval


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of Table 5: which tokens are learned, and whether patches go."""

    text: bool
    visual: bool
    pruned: bool

    @property
    def name(self) -> str:
        """ "dense", "pruned", "tuned dense (text)", "tuned pruned (text + visual)", ..."""
        kind = "pruned" if self.pruned else "dense"
        if not self.text:
            return kind
        return f"tuned {kind} ({'text + visual' if self.visual else 'text'})"


CELLS = tuple(
    Cell(text=text, visual=visual, pruned=pruned)
    for text, visual in ((False, False), (True, False), (True, True))
    for pruned in (False, True)
)
"""The six rows of Table 5, in its order."""


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """Fractions in [0, 1]; image MACs per image, visual tokens included."""

    name: str
    acc1: float
    acc1_std: float | None
    """Over seeds; None for rows that nothing was drawn for."""
    acc1_seeds: list[float]
    image_macs: int
    macs_share: float
    """Of the dense tower without visual tokens."""
    loss: float | None
    """Accuracy of the dense row of the same tuning less this one; None in dense rows."""
    loss_ci95: tuple[float, float] | None
    """Paired bootstrap over images, hits averaged over seeds."""


def make_row(cell: Cell, hit_SI: Tensor, macs: int, dense_macs: int, dense_hit_SI: Tensor | None) -> PromptRow:
    """A row from hits (S, I) of 0 and 1, and for a pruned row those of its dense twin."""
    seeds = hit_SI.double().mean(1).tolist()
    loss, interval = None, None
    if dense_hit_SI is not None:
        pruned_I, dense_I = hit_SI.double().mean(0), dense_hit_SI.double().mean(0)
        loss, interval = (dense_I - pruned_I).mean().item(), paired_interval(dense_I, pruned_I)
    return PromptRow(
        name=cell.name,
        acc1=mean(seeds),
        acc1_std=stdev(seeds) if len(seeds) > 1 else None,
        acc1_seeds=seeds,
        image_macs=macs,
        macs_share=macs / dense_macs,
        loss=loss,
        loss_ci95=interval,
    )


def markdown(rows: list[PromptRow], title: str) -> str:
    """The table for people, percent throughout."""
    head = "| tuning | MACs % | top-1 % | +- over seeds | loss to its dense row, points | 95 % interval |"
    lines = [f"{title}\n", head, "|---" * 6 + "|"]
    for row in rows:
        spread = "-" if row.acc1_std is None else f"{100 * row.acc1_std:.2f}"
        loss, interval = "-", "-"
        if row.loss is not None and row.loss_ci95 is not None:
            loss = f"{100 * row.loss:+.2f}"
            interval = f"[{100 * row.loss_ci95[0]:+.2f}, {100 * row.loss_ci95[1]:+.2f}]"
        lines.append(
            f"| {row.name} | {100 * row.macs_share:.1f} | {100 * row.acc1:.2f} | {spread} | {loss} | {interval} |"
        )
    return "\n".join(lines)


def as_dicts(rows: list[PromptRow]) -> list[dict]:
    """Rows as JSON."""
    return [asdict(row) for row in rows]


def hits(logits_IY: Tensor, label_I: Tensor) -> Tensor:
    """1 where the highest logit is the label's, else 0; float (I,)."""
    return (logits_IY.argmax(-1) == label_I).to(torch.float32)
