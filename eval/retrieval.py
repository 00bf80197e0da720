"""`python -m eval retrieval`: pictures by caption and captions by picture, recall@k of the dense and of pruned towers.

With several captions a picture, as in the CLIP papers: a caption is right if its picture is among the first k, a
picture if any of its captions is.

Letters: I images, T captions, Q queries, G gallery, D feature.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.features import Features
from eval.measuring import Bench, Judge, MeasureConfig, Outcome, open_bench, records_of
from eval.record_table import print_records, write_table
from eval.records import RETRIEVAL, Record
from patchrank.data import load_dataset
from patchrank.errors import UserError

IMAGE, TEXT = "image_retrieval_recall@{}", "text_retrieval_recall@{}"
"""CLIP_benchmark's names: a picture by its caption, a caption by its picture."""
_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(MeasureConfig):
    """Retrieval recall of the dense tower and of pruned ones, one JSON each."""

    data: str = "digits"
    """Data set with captions: a row of the catalog."""
    split: str = "test"
    """Split to judge on."""
    recall: tuple[int, ...] = (1, 5, 10)
    """The k of recall@k; headlines show 5, or the first where 5 is not among them."""
    out: Path = Path("out/retrieval")
    """Folder of the records."""


def main(config: RetrievalConfig) -> None:
    """Measure what `--out` lacks, then print the table."""
    with open_bench(config) as bench:
        records = measure(config, bench, config.data)
    write_table("retrieval", config, records)
    print_records(records, bench.unreached)
    print(f"{len(records)} records in {config.out}")


def measure(config: RetrievalConfig, bench: Bench, data: str) -> list[Record]:
    """Records of all methods on one data set; those that `--out` holds are read, not measured.

    Raises: UserError for pictures without captions, a model without text tower, or a k beyond the gallery.
    """
    if bench.clip.text is None:
        raise UserError(f"--model {config.model}: has no text tower to compare captions with; load a whole CLIP")
    dataset = load_dataset(data, root=config.data_root, split=config.split)
    items = bench.choose(dataset)
    if not all(item.captions for item in items):
        raise UserError(f"--data {data}: has pictures without captions; choose flickr8k, flickr30k, coco or digits")
    for k in config.recall:
        if not 1 <= k <= len(items):
            raise UserError(f"--recall {k}: must be 1 to {len(items)}, the number of pictures here")
    if not config.recall:
        raise UserError("--recall: names no k; write for example --recall 1 5 10")

    def start(dense: Features) -> Judge:
        if len(dense.items) < max(config.recall):
            raise UserError(f"--data {data}: too many broken pictures for recall@{max(config.recall)}; choose others")
        text_TD = bench.clip.text([caption for item in dense.items for caption in item.captions]).cpu()
        return lambda method, found: judge(found, dense, text_TD, config.recall)

    said = dict(task=RETRIEVAL, protocol="captions", settings={"recall": list(config.recall)})
    return records_of(config.out, bench, dataset, items, start, **said)


def hits_at_k(similarity_QG: Tensor, match_QG: Tensor, ks: tuple[int, ...]) -> dict[int, Tensor]:
    """k -> (Q,) bool: whether a match (Q, G) bool is among the k most similar; ties fall to the lowest index."""
    hits: dict[int, list[Tensor]] = {k: [] for k in ks}
    for similarity, match in zip(similarity_QG.split(_CHUNK), match_QG.split(_CHUNK)):
        top = torch.sort(similarity, dim=1, descending=True, stable=True).indices[:, : max(ks)]
        found = match.gather(1, top)
        for k in ks:
            hits[k].append(found[:, :k].any(1))
    return {k: torch.cat(parts) for k, parts in hits.items()}


def judge(found: Features, dense: Features, text_TD: Tensor, ks: tuple[int, ...]) -> Outcome:
    """Recall both ways of one method's features.

    Args: text_TD, unit features of all captions, those of the first image first. In the sides every image carries the
    share of its captions that find it, and whether it finds one of its captions.
    """
    owner_T = torch.tensor([place for place, item in enumerate(found.items) for _ in item.captions])
    similarity_TI = text_TD @ F.normalize(found.feature_ID, dim=-1).T
    match_TI = owner_T.unsqueeze(1) == torch.arange(len(found.items))
    by_caption, by_image = hits_at_k(similarity_TI, match_TI, ks), hits_at_k(similarity_TI.T, match_TI.T, ks)
    num_I = torch.bincount(owner_T).double()
    metrics, sides = {}, {"ids": found.ids, "cosine": found.cosines(dense)}
    for k in ks:
        metrics[IMAGE.format(k)] = by_caption[k].double().mean().item()
        metrics[TEXT.format(k)] = by_image[k].double().mean().item()
        share_I = torch.bincount(owner_T, weights=by_caption[k].double()) / num_I
        sides |= {IMAGE.format(k): share_I.float().numpy(), TEXT.format(k): by_image[k].numpy()}
    metrics["cosine"] = float(sides["cosine"].mean())
    return Outcome(metrics=metrics, main_metric=IMAGE.format(5 if 5 in ks else ks[0]), sides=sides)
