"""What the answers of a server are held against: the same graphs, run here, one image at a time.

Letters: B images, D feature.
"""

from dataclasses import dataclass

import numpy as np

from export.serve_folder import ServedFolder
from export.serve_models import open_run
from export.source import load_pictures
from patchrank.data import load_dataset
from patchrank.errors import UserError

LIMITS = {"float32": 1e-4, "float16": 5e-3}
"""Largest difference of a unit feature's component: that of the parity gate, and float16's rounding.

int8 is not there: its activations are rounded by the largest value in a batch, so an answer depends on its neighbours.
"""
_BATCH = 16


@dataclass(frozen=True)
class Truth:
    """Local answers of every variant on the same images."""

    ids: list[str]
    image_BHW3: np.ndarray
    label_B: np.ndarray | None
    feature_BD: dict[str, np.ndarray]
    """By served name."""
    best_B: dict[str, np.ndarray] | None
    """Best class by served name; None for graphs without a class list."""
    limit: float
    unstable: list[str]
    """Images that were left out: two scores are so close that the order of additions decides, here already."""

    @property
    def outputs(self) -> list[str]:
        """What a request asks for."""
        return ["feature"] if self.best_B is None else ["feature", "top5_index"]

    def accuracy(self) -> dict[str, float] | None:
        """Of every variant on all images; None without labels."""
        if self.best_B is None or self.label_B is None:
            return None
        return {name: float((best_B == self.label_B).mean()) for name, best_B in self.best_B.items()}

    def is_wrong(self, model: str, rows: np.ndarray, values: dict[str, np.ndarray]) -> bool:
        """Whether an answer for the images `rows` differs from the local one."""
        feature_BD, known_BD = values["feature"], self.feature_BD[model][rows]
        if feature_BD.shape != known_BD.shape or not np.abs(feature_BD - known_BD).max() <= self.limit:
            return True
        return self.best_B is not None and bool((values["top5_index"][:, 0] != self.best_B[model][rows]).any())


def load_truth(folder: ServedFolder, data: str, data_root, split: str, num_images: int) -> Truth:
    """Images of a data set and every variant's answers.

    Raises: UserError for a precision whose answers depend on the batch, or data without a readable picture.
    """
    precision = folder.default.record["precision"]
    if precision not in LIMITS:
        raise UserError(f"--precision {precision}: its answers depend on the batch; choose one of {', '.join(LIMITS)}")
    dataset = load_dataset(data, root=data_root, split=split)
    pictures = load_pictures(dataset, folder.preprocess, num_images)
    image_BHW3 = np.ascontiguousarray(pictures.image_BHW3.numpy())
    labels = {item.id: item.label for item in dataset.images}
    own = [labels[id] for id in pictures.ids]
    alone = {model.name: _answers(model, image_BHW3, 1) for model in folder.variants}
    joined = {model.name: _answers(model, image_BHW3, _BATCH) for model in folder.variants}
    limit = LIMITS[precision]
    stable_B = np.all([_agree(alone[name], joined[name], limit) for name in alone], axis=0)
    if not stable_B.any():
        raise UserError(f"--model {folder.path}: its answers depend on the batch for every image; export it again")
    kept = [number for number, stable in enumerate(stable_B) if stable]
    # Labels mean something only where the graph's classes are the data set's.
    labelled = None not in own and folder.class_names == list(dataset.class_names)
    return Truth(
        ids=[pictures.ids[number] for number in kept],
        image_BHW3=image_BHW3[kept],
        label_B=np.array(own)[kept] if labelled else None,
        feature_BD={name: values["feature"][kept] for name, values in alone.items()},
        best_B={name: v["top5_index"][kept, 0] for name, v in alone.items()} if folder.class_names else None,
        limit=limit,
        unstable=[id for id, stable in zip(pictures.ids, stable_B) if not stable],
    )


def _answers(model, image_BHW3: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    outputs = [value["name"] for value in model.record["outputs"]]
    run = open_run(model.graph, outputs, threads=1)
    (name,) = [value["name"] for value in model.record["inputs"]]
    parts = [run({name: image_BHW3[start : start + batch]}) for start in range(0, len(image_BHW3), batch)]
    return {output: np.concatenate([part[output] for part in parts]) for output in outputs}


def _agree(one: dict[str, np.ndarray], other: dict[str, np.ndarray], limit: float) -> np.ndarray:
    """Per image, whether two runs give the same feature, patches and best class."""
    same_B = np.abs(one["feature"] - other["feature"]).max(1) <= limit
    if "kept" in one:
        same_B &= (np.sort(one["kept"], 1) == np.sort(other["kept"], 1)).all(1)
    if "top5_index" in one:
        same_B &= one["top5_index"][:, 0] == other["top5_index"][:, 0]
    return same_B
