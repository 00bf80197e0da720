"""`python -m eval composition`: is the right caption nearer to the picture than one that is wrong in one thing?

Letters: I questions (picture, right caption, wrong caption), D feature.
"""

from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from eval.features import Features
from eval.measuring import Bench, Judge, MeasureConfig, Outcome, open_bench, records_of
from eval.record_table import print_records, write_table
from eval.records import COMPOSITION, Record
from eval.tables import as_text
from patchrank.data import CATALOG, load_dataset
from patchrank.errors import UserError

KINDS = {"obj": "objects", "att": "attributes", "rel": "relations"}
"""Ending of a category -> what it is about."""


@dataclass(frozen=True, kw_only=True)
class CompositionConfig(MeasureConfig):
    """Compositionality (SugarCrepe) of the dense tower and of pruned ones, one JSON for each category."""

    data: str = "digits-pairs"
    """sugarcrepe, or digits-pairs: the same question about drawn digits."""
    categories: tuple[str, ...] = ()
    """Categories, which are splits of the data set; without it all."""
    out: Path = Path("out/composition")
    """Folder of the records."""


def main(config: CompositionConfig) -> None:
    """Measure what `--out` lacks, then print the categories and their means."""
    with open_bench(config) as bench:
        records = measure(config, bench, config.data)
    write_table("composition", config, records)
    print_records(records, bench.unreached)
    print(_means_table(records))
    print(f"{len(records)} records in {config.out}")


def measure(config: CompositionConfig, bench: Bench, data: str) -> list[Record]:
    """Records of all methods in all categories; those that `--out` holds are read, not measured.

    Raises: UserError for an unknown category, data without pairs of captions, or a model without text tower.
    """
    if bench.clip.text is None:
        raise UserError(f"--model {config.model}: has no text tower to compare captions with; load a whole CLIP")
    if data not in CATALOG:
        raise UserError(f"--data {data}: unknown; choose sugarcrepe or digits-pairs")
    records = []
    for category in config.categories or CATALOG[data].splits:
        records += _measure_category(config, bench, data, category)
    return records


def _measure_category(config: CompositionConfig, bench: Bench, data: str, category: str) -> list[Record]:
    dataset = load_dataset(data, root=config.data_root, split=category)
    items = bench.choose(dataset)
    if any(len(item.captions) != 2 for item in items):
        raise UserError(
            f"--data {data}: needs a right and a wrong caption a picture; choose sugarcrepe or digits-pairs"
        )

    def start(dense: Features) -> Judge:
        captions = [caption for item in dense.items for caption in item.captions]
        text_I2D = bench.clip.text(captions).cpu().unflatten(0, (-1, 2))
        return lambda method, found: judge(found, dense, text_I2D)

    return records_of(config.out, bench, dataset, items, start, task=COMPOSITION, protocol="pairs")


def judge(found: Features, dense: Features, text_I2D: Tensor) -> Outcome:
    """Share of the questions whose right caption (first of the two unit rows) is at least as near as the wrong one.

    `acc` and `text_acc` are equal, for a question has one picture. Ties count as right, as in CLIP_benchmark's argmax.
    """
    similarity_I2 = (text_I2D @ F.normalize(found.feature_ID, dim=-1).unsqueeze(-1)).squeeze(-1)
    correct_I = similarity_I2[:, 0] >= similarity_I2[:, 1]
    share, cosine_I = correct_I.double().mean().item(), found.cosines(dense)
    metrics = {"acc": share, "text_acc": share, "cosine": float(cosine_I.mean())}
    sides = {"ids": found.ids, "correct": correct_I.numpy(), "cosine": cosine_I}
    return Outcome(metrics=metrics, main_metric="acc", sides=sides)


def kind_means(records: list[Record]) -> dict[tuple[str, float], dict[str, float]]:
    """(method, budget) -> mean accuracy over the categories about objects, attributes and relations, and over all."""
    found: dict[tuple[str, float], dict[str, list[float]]] = {}
    for record in records:
        kind = KINDS.get(record.split.rpartition("_")[2], record.split)
        row = found.setdefault((record.method, record.macs), {})
        row.setdefault(kind, []).append(record.main)
        row.setdefault("all", []).append(record.main)
    return {key: {kind: sum(values) / len(values) for kind, values in row.items()} for key, row in found.items()}


def _means_table(records: list[Record]) -> str:
    means = kind_means(records)
    kinds = [kind for kind in dict.fromkeys(kind for row in means.values() for kind in row) if kind != "all"] + ["all"]
    lines = [
        [method, f"{100 * macs:.3g}", *(f"{100 * row[kind]:.1f}" for kind in kinds)]
        for (method, macs), row in means.items()
    ]
    return "means over categories, %\n" + as_text(["method", "budget %", *kinds], lines)
