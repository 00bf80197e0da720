"""The gate: a graph in a runtime against PyTorch on real images. What does not agree is not published.

A near-tie is an image whose scores at rank K and K + 1 are closer than rounding can tell apart. It is excused only
where its kept set really differs, and then its feature is compared with that set forced; a near-tie that agrees needs
no excuse and counts like every other image. Folding has ties too: a patch whose best two hosts are equally near. Where
rounding sends it to the other one and the feature shows it, the image is counted as moved; its answer still counts.

Letters: B images, K kept, D feature, Y classes.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from export.reference import Reference, forced, reference
from export.runtimes import BATCHES, RUNTIMES, Runner, run_in_batches
from export.serving import ServingGraph
from export.source import Pictures, as_numpy
from patchrank.errors import UserError

TIED = ("float32", "float16")
"""Precisions in which a graph chooses its patches as PyTorch does."""
NEAR_TIE = 1e-5
"""Scores at rank K and K + 1 closer than this may change places by rounding."""
HOST_TIE = {"float32": 1e-5, "float16": 2e-3}
"""Cosines to two hosts closer than this may change places by rounding; 2e-3 is two units of float16's last place."""
MAX_EXCUSED = 0.005
"""Share of images, rounded up to a whole image; for excused and for moved ones."""


class ParityError(UserError):
    """A graph does not compute what the module does."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What must hold; None where a figure is only reported."""

    max_abs: float | None
    cosine_min: float | None
    cosine_mean: float | None
    kept_agreement: float | None
    top1_agreement: float | None


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a graph is from float32 PyTorch; features are unit vectors."""

    num_images: int
    batches: tuple[int, ...]
    max_abs: float
    """Largest difference of a feature's component; images whose kept set differs are compared with that set forced."""
    max_abs_by_batch: dict[str, float]
    cosine_min: float
    cosine_mean: float
    kept_agreement: float
    """Share of images with the same kept sets at every cut, excused ones left out."""
    top1_agreement: float | None
    """Share of images with the same best class, excused ones left out; None without classes."""
    accuracy: float | None
    """Share of images whose best class is their label, at the first batch size; None without labels."""
    torch_accuracy: float | None
    """The same of float32 PyTorch."""
    num_near_ties: int
    num_excused: int
    """Near-ties whose kept set differs."""
    num_forced: int
    """Images compared with their kept set forced."""
    num_moved: int
    """Images beyond the limits because a patch joined the other of two equally near hosts; `max_abs` and the cosines
    are of the others."""
    moved_cosine_min: float | None
    torch_float16_max_abs: float | None
    """PyTorch's own float16 against its float32, both with the same kept sets."""
    worst: str
    """Id of the image with the largest difference."""

    def to_dict(self) -> dict:
        """JSON-able form."""
        return asdict(self) | {"batches": list(self.batches)}


def limits_of(precision: str, torch_float16_max_abs: float | None = None) -> Limits:
    """The gate's limits; float16 may err twice as much as PyTorch's own float16 does on the same images."""
    if precision == "float32":
        return Limits(max_abs=1e-4, cosine_min=0.99999, cosine_mean=None, kept_agreement=1.0, top1_agreement=1.0)
    if precision == "float16":
        twice = None if torch_float16_max_abs is None else 2 * torch_float16_max_abs
        return Limits(max_abs=twice, cosine_min=0.999, cosine_mean=None, kept_agreement=None, top1_agreement=0.999)
    return Limits(max_abs=None, cosine_min=None, cosine_mean=0.998, kept_agreement=None, top1_agreement=None)


def failures(parity: Parity, limits: Limits) -> list[str]:
    """What breaks a limit, in words; empty if everything holds."""
    found = []
    if limits.max_abs is not None and not parity.max_abs <= limits.max_abs:
        found.append(f"max-abs {parity.max_abs:.3g} > {limits.max_abs:.3g}")
    for name in ("cosine_min", "cosine_mean", "kept_agreement", "top1_agreement"):
        value, least = getattr(parity, name), getattr(limits, name)
        if value is not None and least is not None and not value >= least:
            found.append(f"{name.replace('_', ' ')} {value:.6g} < {least:g}")
    allowed = int(np.ceil(MAX_EXCUSED * parity.num_images))
    if parity.num_moved > allowed:
        found.append(
            f"{parity.num_moved} of {parity.num_images} images fold a patch into another host, more than {allowed}"
        )
    if limits.kept_agreement is not None and parity.num_excused > allowed:
        found.append(
            f"{parity.num_excused} of {parity.num_images} images keep other patches at a near-tie, more than {allowed}"
        )
    return found


def check(parity: Parity, precision: str, name: str) -> None:
    """Raise ParityError, naming the worst image, if a limit of this precision is broken."""
    broken = failures(parity, limits_of(precision, parity.torch_float16_max_abs))
    if broken:
        raise ParityError(
            f"{name}: differs from PyTorch ({'; '.join(broken)}); worst image {parity.worst}; nothing was published"
        )


def compare(
    runner: Runner,
    graph: ServingGraph,
    pictures: Pictures,
    precision: str,
    known: Reference,
    largest_batch: int = max(BATCHES),
) -> Parity:
    """Figures of one graph in one runtime against `known`, PyTorch's float32 outputs for the same images.

    Args: largest_batch that the runtime takes.
    """
    image = as_numpy(pictures.image_BHW3)
    runs = {batch: run_in_batches(runner, image, batch) for batch in BATCHES if batch <= largest_batch}
    rows = [_Row(graph, pictures.image_BHW3, outputs, precision, known) for outputs in runs.values()]
    near_B = known.margin_B < NEAR_TIE
    same_set_B = torch.stack([row.same_set_B for row in rows]).all(0)
    # int8 moves tokens before the cut, so near-ties mean nothing there: every image counts.
    excused_B = near_B & ~same_set_B & (precision in TIED)
    difference_B = torch.stack([row.difference_B for row in rows]).amax(0)
    cosine_B = torch.stack([row.cosine_B for row in rows]).amin(0)
    moved_B = _moved(known, difference_B, cosine_B, precision)
    differs_B = difference_B.masked_fill(moved_B, 0)
    same_answer = [row.same_answer_B for row in rows if row.same_answer_B is not None]
    accuracy, torch_accuracy = _accuracies(graph, pictures, rows[0].answer_B, known)
    return Parity(
        num_images=len(pictures.ids),
        batches=tuple(runs),
        max_abs=float(differs_B.max()),
        max_abs_by_batch={
            str(batch): float(row.difference_B.masked_fill(moved_B, 0).max()) for batch, row in zip(runs, rows)
        },
        cosine_min=float(cosine_B.masked_fill(moved_B, 1).min()),
        cosine_mean=float(cosine_B[~moved_B].mean()) if not moved_B.all() else 1.0,
        kept_agreement=_share(same_set_B[~excused_B]),
        top1_agreement=_share(torch.stack(same_answer).all(0)[~excused_B]) if same_answer else None,
        accuracy=accuracy,
        torch_accuracy=torch_accuracy,
        num_near_ties=int(near_B.sum()),
        num_excused=int(excused_B.sum()),
        num_forced=int(torch.stack([row.forced_B for row in rows]).any(0).sum()),
        num_moved=int(moved_B.sum()),
        moved_cosine_min=float(cosine_B[moved_B].min()) if moved_B.any() else None,
        torch_float16_max_abs=_torch_float16(graph, pictures, known) if precision == "float16" else None,
        worst=pictures.ids[int(differs_B.argmax())],
    )


def _moved(known: Reference, difference_B: Tensor, cosine_B: Tensor, precision: str) -> Tensor:
    """Which images (B,) are beyond the limits of this precision and have two hosts that rounding cannot tell apart."""
    if precision not in TIED:
        return torch.zeros_like(difference_B, dtype=torch.bool)
    limits = limits_of(precision)
    beyond_B = cosine_B < limits.cosine_min
    beyond_B |= difference_B > (float("inf") if limits.max_abs is None else limits.max_abs)
    return beyond_B & (known.host_margin_B < HOST_TIE[precision])


def _accuracies(
    graph: ServingGraph, pictures: Pictures, answer_B: Tensor | None, known: Reference
) -> tuple[float | None, float | None]:
    """Of the graph and of PyTorch, where the graph's class list is that of the labels."""
    if answer_B is None or pictures.label_B is None or tuple(graph.classes.names) != pictures.class_names:
        return None, None
    return _share(answer_B == pictures.label_B), _share(known.logit_BY.argmax(-1) == pictures.label_B)


def difference_of(feature_BD: Tensor, known_BD: Tensor) -> Tensor:
    """Largest difference per image; what is not a number is infinitely far."""
    return (feature_BD - known_BD).abs().amax(-1).nan_to_num(nan=float("inf"))


def _share(agrees: Tensor) -> float:
    return float(agrees.double().mean()) if len(agrees) else 1.0


def _torch_float16(graph: ServingGraph, pictures: Pictures, known: Reference) -> float:
    feature_BD, _ = forced(graph, pictures.image_BHW3, known.kept, half=True)
    return float((feature_BD - known.feature_BD).abs().max())


class _Row:
    """One batch size: per image the difference, the cosine and the agreements."""

    def __init__(
        self, graph: ServingGraph, image_BHW3: Tensor, outputs: dict, precision: str, known: Reference
    ) -> None:
        values = {name: torch.from_numpy(value) for name, value in outputs.items()}
        kept = [values[name] for name in graph.output_names if name.startswith("kept")]
        self.same_set_B = torch.ones(len(image_BHW3), dtype=torch.bool)
        for ours_BK, theirs_BK in zip(known.kept, kept):
            self.same_set_B &= (ours_BK.sort(-1).values == theirs_BK.sort(-1).values).all(-1)
        feature_BD, logit_BY = known.feature_BD, known.logit_BY
        # int8 is judged as users meet it, with its own choice of patches.
        self.forced_B = ~self.same_set_B & (precision in TIED)
        if self.forced_B.any():
            where = self.forced_B
            again_BD, again_BY = forced(graph, image_BHW3[where], [kept_BK[where] for kept_BK in kept])
            feature_BD = feature_BD.clone()
            feature_BD[where] = again_BD
            if logit_BY is not None:
                logit_BY = logit_BY.clone()
                logit_BY[where] = again_BY
        self.difference_B = difference_of(values["feature"], feature_BD)
        self.cosine_B = F.cosine_similarity(values["feature"].double(), feature_BD.double())
        self.answer_B = None if logit_BY is None else values["logits"].argmax(-1)
        self.same_answer_B = None if logit_BY is None else self.answer_B == logit_BY.argmax(-1)


def gate(
    path: Path,
    graph: ServingGraph,
    pictures: Pictures,
    precision: str,
    known: Reference | None = None,
    runtime: str = "onnxruntime",
) -> Parity:
    """Compare and check one file in one runtime. Raises: ParityError."""
    runner = RUNTIMES[runtime](path, None)
    parity = compare(runner, graph, pictures, precision, known or reference(graph, pictures.image_BHW3))
    check(parity, precision, f"{path.name} in {runtime}")
    return parity
