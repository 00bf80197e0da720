"""`python -m eval zero-shot`: top-1, top-5 and mean-per-class accuracy of the dense tower and of pruned ones.

Letters: I images, Y classes, D feature.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.features import Features
from eval.measuring import Bench, Judge, MeasureConfig, Outcome, open_bench, records_of
from eval.protocols import ACC1, HEAD, PER_CLASS, PROTOCOLS, check_protocol, load_for
from eval.record_table import print_records, write_table
from eval.records import CLASSIFICATION, Record, text_sha256
from patchrank.classifier import Classifier, classifier
from patchrank.errors import UserError
from patchrank.metrics import accuracy, mean_per_class


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig(MeasureConfig):
    """Zero-shot accuracy of the dense tower and of pruned ones, one JSON each."""

    data: str = "digits"
    """Data set: a row of the catalog, or "folder"."""
    split: str | None = None
    """Split to judge on; without it "test"."""
    protocol: str = "coop"
    """coop (one prompt), openai (ensembles, mean per class where the CLIP paper has it) or vtab (CLIP_benchmark's)."""
    out: Path = Path("out/zero-shot")
    """Folder of the records."""


def main(config: ZeroShotConfig) -> None:
    """Measure what `--out` lacks, then print the table."""
    with open_bench(config) as bench:
        records = measure(config, bench, config.data)
    write_table("zero-shot", config, records)
    print_records(records, bench.unreached)
    print(f"{len(records)} records in {config.out}")


def measure(config: ZeroShotConfig, bench: Bench, data: str) -> list[Record]:
    """Records of all methods on one data set; those that `--out` holds are read, not measured.

    Raises: UserError for a data set without labels or a model without an answer for its classes.
    """
    check_protocol(config.protocol)
    head = bench.clip.class_head is not None
    dataset = load_for("coop" if head else config.protocol, data, config.data_root, config.split or "test")
    if any(item.label is None for item in dataset.images) or not dataset.class_names:
        raise UserError(f"--data {data}: has no class labels to be right about; use python -m eval retrieval instead")
    main_metric = ACC1 if head else PROTOCOLS[config.protocol].main_metric(data)

    def start(dense: Features) -> Judge:
        logits = classifier(bench.clip, dataset)
        return lambda method, found: judge(found, dense, logits, main_metric)

    said = dict(task=CLASSIFICATION, protocol=HEAD if head else config.protocol)
    said["templates_sha256"] = None if head else text_sha256(dataset.templates)
    return records_of(config.out, bench, dataset, bench.choose(dataset), start, **said)


def judge(
    found: Features,
    dense: Features,
    logits: Classifier,
    main_metric: str = ACC1,
    dense_logits: Classifier | None = None,
) -> Outcome:
    """Metrics of one method's features; labels come with the items.

    Args: dense_logits, what answers for the unpruned features where it is not `logits`.
    """
    label_I = torch.tensor([item.label for item in found.items])
    logit_IY = logits(found.feature_ID).cpu()
    answer_I, dense_I = logit_IY.argmax(-1), (dense_logits or logits)(dense.feature_ID).cpu().argmax(-1)
    cosine_I = found.cosines(dense)
    metrics = classification_metrics(logit_IY, label_I)
    metrics |= {"agreement": (answer_I == dense_I).double().mean().item(), "cosine": float(cosine_I.mean())}
    sides = {
        "ids": found.ids,
        "label": label_I.numpy().astype(np.int32),
        "answer": answer_I.numpy().astype(np.int32),
        "correct": (answer_I == label_I).numpy(),
        "agrees": (answer_I == dense_I).numpy(),
        "cosine": cosine_I,
    }
    return Outcome(metrics=metrics, main_metric=main_metric, sides=sides)


def classification_metrics(logit_IY: Tensor, label_I: Tensor) -> dict[str, float]:
    """acc1, mean_per_class_recall and, from five classes on, acc5: fractions, as CLIP_benchmark defines them."""
    found = {ACC1: accuracy(logit_IY, label_I), PER_CLASS: mean_per_class(logit_IY.argmax(-1), label_I)}
    if logit_IY.shape[1] >= 5:
        found["acc5"] = accuracy(logit_IY, label_I, k=5)
    return found
