"""The gate of text towers: unit features of a graph in a runtime against PyTorch's. Letters: B texts, L tokens."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from export.parity import BATCHES, Parity, check, difference_of
from export.runtimes import RUNTIMES, run_in_batches
from export.text_graph import TextGraph, text_features


def gate_text(
    path: Path, graph: TextGraph, token_BL: Tensor, texts: list[str], precision: str, runtime: str = "onnxruntime"
) -> Parity:
    """Compare and check one file in one runtime, features only. Raises: ParityError."""
    known_BD, runner = text_features(graph, token_BL), RUNTIMES[runtime](path, None)
    runs = {batch: run_in_batches(runner, token_BL.numpy(), batch)["feature"] for batch in BATCHES}
    features = {batch: torch.from_numpy(feature) for batch, feature in runs.items()}
    difference = {batch: difference_of(feature, known_BD) for batch, feature in features.items()}
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
        accuracy=None,
        torch_accuracy=None,
        num_near_ties=0,
        num_excused=0,
        num_forced=0,
        num_moved=0,
        moved_cosine_min=None,
        torch_float16_max_abs=None if half is None else float((half - known_BD).abs().max()),
        worst=texts[int(worst_B.argmax())],
    )
    check(parity, precision, f"{path.name} in {runtime}")
    return parity
