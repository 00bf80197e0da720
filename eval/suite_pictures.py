"""Pictures of what our method keeps: the images whose feature suffers least and most, as data for the report.

Letters: H rows and W columns of pixels, N patches, K kept.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from eval.measuring import Bench
from eval.records import DENSE, read_records, read_sides
from eval.report_data import PICTURES
from eval.report_rows import Measured
from eval.rivals import OURS
from eval.rivals.covering import Pruned
from eval.suite_config import SuiteConfig, file_stem
from eval.suite_sets import Present
from export.serving import kept_positions
from patchrank.atomic import write_json
from patchrank.data import Dataset
from patchrank.loading import LoadedClip
from patchrank.preprocess import Preprocess
from patchrank.pruned import PrunedTower

_SIDE = 160
"""Pixels of the longer side of a picture in the report."""


def extremes(cosine_I: np.ndarray, num: int) -> tuple[list[int], list[int]]:
    """Places of the `num` highest and lowest values, best first and worst first; never the same image twice."""
    order = np.argsort(-cosine_I, kind="stable").tolist()
    num = min(num, len(order) // 2)
    return order[:num], order[::-1][:num]


def picture(image_HW3: np.ndarray) -> str:
    """A small JPEG as base64."""
    image = Image.fromarray(image_HW3)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=88)
    return base64.b64encode(file.getvalue()).decode()


def pixels(preprocess: Preprocess, image_CHW: torch.Tensor) -> np.ndarray:
    """What the model saw, (H, W, 3) uint8: the normalisation taken back."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (preprocess.mean, preprocess.std))
    return (image_CHW * std + mean).mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


@torch.inference_mode()
def kept_at(pruned: PrunedTower, image_CHW: torch.Tensor) -> list[list[int]]:
    """Original positions of the patches that each cut leaves, rising."""
    _, cuts = pruned.tokens(image_CHW.unsqueeze(0))
    return [sorted(position_1K[0].tolist()) for position_1K in kept_positions(cuts)]


def draw(
    clip: LoadedClip,
    dataset: Dataset,
    row: Measured,
    dense: Measured,
    pruned: PrunedTower,
    class_names: Sequence[str],
    num: int,
    photos: bool,
) -> dict:
    """The best and worst images of one row as JSON: pictures, kept positions, cosine and answers.

    Args: photos: whether to hold the images themselves; what the project draws is held in any case.
    """
    photos = photos or dataset.root is None
    best, worst = extremes(row.sides["cosine"], num)
    answer_of = dict(zip(dense.sides["ids"].tolist(), dense.sides["answer"].tolist()))
    label_of = {item.id: item.label for item in dataset.images}

    def entry(place: int) -> dict:
        image_id = str(row.sides["ids"][place])
        image_CHW = clip.preprocess(dataset.open(image_id))
        return {
            "id": image_id,
            "cosine": float(row.sides["cosine"][place]),
            "truth": class_names[label_of[image_id]],
            "dense_answer": class_names[answer_of[image_id]],
            "answer": class_names[int(row.sides["answer"][place])],
            "kept": kept_at(pruned, image_CHW),
        } | ({"jpeg": picture(pixels(clip.preprocess, image_CHW))} if photos else {})

    return {
        "dataset": dataset.name,
        "drawn": dataset.root is None,
        "method": row.record.method,
        "macs": row.record.macs,
        "grid": list(clip.tower.config.grid),
        "layers": [layer for layer, _ in pruned.spec.cuts],
        "best": [entry(place) for place in best],
        "worst": [entry(place) for place in worst],
    }


def write_pictures(config: SuiteConfig, bench: Bench, present: Sequence[Present]) -> None:
    """pictures_<model>.json: our method at its smallest budget on every data set."""
    clip = bench.clip
    rows = [one for one in bench.methods if one.name == OURS and isinstance(one.module, Pruned)]
    if not config.pictures or not rows:
        return
    ours = min(rows, key=lambda one: one.macs)
    records = [one for one in read_records(config.out) if one.weights_hash == clip.weights_hash and one.side]
    sheets = []
    for one in present:
        found = [x for x in records if x.dataset == one.dataset.name and "answer" in read_sides(config.out, x)]
        row = [x for x in found if x.method == OURS and x.macs == ours.macs and x.keep is None]
        dense = [x for x in found if x.method == DENSE]
        if row and dense:
            last, base = (max(some, key=lambda x: x.num_images) for some in (row, dense))
            pair = (Measured(x, read_sides(config.out, x)) for x in (last, base))
            sheets.append(
                draw(
                    clip,
                    one.dataset,
                    *pair,
                    ours.module.pruned,
                    one.dataset.class_names,
                    config.pictures,
                    config.photos,
                )
            )
    value = {"kind": PICTURES, "schema": 1, "model": clip.model_name, "weights_hash": clip.weights_hash}
    write_json(config.out / f"pictures_{file_stem(clip)}.json", value | {"sheets": sheets})
