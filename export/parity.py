"""The gate: a graph in ONNX Runtime against PyTorch on real images. What does not agree is not published.

Letters: B images, K kept, D feature, Y classes.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from export.reference import Reference, forced, reference
from export.serving import ServingGraph
from export.source import Pictures, as_numpy
from export.text_graph import TextGraph, text_features
from patchrank.errors import UserError

BATCHES = (1, 5, 16)
NEAR_TIE = 1e-5
"""Scores at rank K and K + 1 closer than this may change places by rounding."""
MAX_NEAR_TIES = 0.005
"""Share of images, rounded up to a whole image."""


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
    """Share of images with the same kept sets at every cut, near-ties left out."""
    top1_agreement: float | None
    """Share of images with the same best class, near-ties left out; None without classes."""
    num_near_ties: int
    num_forced: int
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
    allowed = int(np.ceil(MAX_NEAR_TIES * parity.num_images))
    if limits.kept_agreement is not None and parity.num_near_ties > allowed:
        found.append(f"{parity.num_near_ties} of {parity.num_images} images are near-ties, more than {allowed}")
    return found


def check(parity: Parity, precision: str, name: str) -> None:
    """Raise ParityError, naming the worst image, if a limit of this precision is broken."""
    broken = failures(parity, limits_of(precision, parity.torch_float16_max_abs))
    if broken:
        raise ParityError(
            f"{name}: differs from PyTorch ({'; '.join(broken)}); worst image {parity.worst}; nothing was published"
        )


def open_session(model: Path | bytes):
    """An ONNX Runtime session on CPU, of a file or a serialised graph, with as many threads as PyTorch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    model = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_in_batches(session, image_BHW3: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    """Outputs of all images by name, computed `batch` at a time; the last call may hold fewer."""
    (name,) = (value.name for value in session.get_inputs())
    names = [value.name for value in session.get_outputs()]
    starts = range(0, len(image_BHW3), batch)
    calls = [session.run(names, {name: image_BHW3[start : start + batch]}) for start in starts]
    return {name: np.concatenate(parts) for name, parts in zip(names, zip(*calls))}


def compare(path: Path, graph: ServingGraph, pictures: Pictures, precision: str, known: Reference) -> Parity:
    """Figures of one graph file against `known`, PyTorch's float32 outputs for the same images."""
    session, image = open_session(path), as_numpy(pictures.image_BHW3)
    runs = {batch: run_in_batches(session, image, batch) for batch in BATCHES}
    rows = [_Row(graph, pictures.image_BHW3, outputs, precision, known) for outputs in runs.values()]
    near_B = known.margin_B < NEAR_TIE
    # int8 moves tokens before the cut, so near-ties mean nothing there: every image counts.
    counted_B = torch.ones_like(near_B) if precision == "int8" else ~near_B
    difference_B = torch.stack([row.difference_B for row in rows]).amax(0)
    cosine_B = torch.stack([row.cosine_B for row in rows]).amin(0)
    same_answer = [row.same_answer_B for row in rows if row.same_answer_B is not None]
    return Parity(
        num_images=len(pictures.ids),
        batches=BATCHES,
        max_abs=float(difference_B.max()),
        max_abs_by_batch={str(batch): float(row.difference_B.max()) for batch, row in zip(runs, rows)},
        cosine_min=float(cosine_B.min()),
        cosine_mean=float(cosine_B.mean()),
        kept_agreement=_share(torch.stack([row.same_set_B for row in rows]).all(0)[counted_B]),
        top1_agreement=_share(torch.stack(same_answer).all(0)[counted_B]) if same_answer else None,
        num_near_ties=int(near_B.sum()),
        num_forced=int(torch.stack([row.forced_B for row in rows]).any(0).sum()),
        torch_float16_max_abs=_torch_float16(graph, pictures, known) if precision == "float16" else None,
        worst=pictures.ids[int(difference_B.argmax())],
    )


def _difference(feature_BD: Tensor, known_BD: Tensor) -> Tensor:
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
        self.forced_B = ~self.same_set_B if precision != "int8" else torch.zeros_like(self.same_set_B)
        if self.forced_B.any():
            where = self.forced_B
            again_BD, again_BY = forced(graph, image_BHW3[where], [kept_BK[where] for kept_BK in kept])
            feature_BD = feature_BD.clone()
            feature_BD[where] = again_BD
            if logit_BY is not None:
                logit_BY = logit_BY.clone()
                logit_BY[where] = again_BY
        self.difference_B = _difference(values["feature"], feature_BD)
        self.cosine_B = F.cosine_similarity(values["feature"].double(), feature_BD.double())
        self.same_answer_B = None if logit_BY is None else values["logits"].argmax(-1) == logit_BY.argmax(-1)


def gate(path: Path, graph: ServingGraph, pictures: Pictures, precision: str, known: Reference | None = None) -> Parity:
    """Compare and check. Raises: ParityError."""
    parity = compare(path, graph, pictures, precision, known or reference(graph, pictures.image_BHW3))
    check(parity, precision, path.name)
    return parity


def gate_text(path: Path, graph: TextGraph, token_BL: Tensor, texts: list[str], precision: str) -> Parity:
    """The same for a text tower: features only. Raises: ParityError."""
    known_BD, session = text_features(graph, token_BL), open_session(path)
    runs = {batch: run_in_batches(session, token_BL.numpy(), batch)["feature"] for batch in BATCHES}
    features = {batch: torch.from_numpy(feature) for batch, feature in runs.items()}
    difference = {batch: _difference(feature, known_BD) for batch, feature in features.items()}
    worst_B = torch.stack(list(difference.values())).amax(0)
    cosine_B = torch.stack([F.cosine_similarity(f.double(), known_BD.double()) for f in features.values()]).amin(0)
    half = text_features(graph, token_BL, half=True) if precision == "float16" else None
    parity = Parity(
        num_images=len(texts),
        batches=BATCHES,
        max_abs=float(worst_B.max()),
        max_abs_by_batch={str(batch): float(value.max()) for batch, value in difference.items()},
        cosine_min=float(cosine_B.min()),
        cosine_mean=float(cosine_B.mean()),
        kept_agreement=1.0,
        top1_agreement=None,
        num_near_ties=0,
        num_forced=0,
        torch_float16_max_abs=None if half is None else float((half - known_BD).abs().max()),
        worst=texts[int(worst_B.argmax())],
    )
    check(parity, precision, path.name)
    return parity
