"""Features of a frozen image tower, computed once: a folder of small files that check themselves and many runs share.

A file holds one stretch of SHARD pictures, keyed by the tower's weights, the transform and the pictures' ids; so a
kill costs one stretch, and a run on other captions or other hyper-parameters computes nothing again.

Letters: N pictures, n of a stretch, D feature.
"""

import hashlib
import json
import logging
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from patchrank.atomic import write_tensors
from patchrank.data import Dataset
from patchrank.preprocess import Preprocess
from patchrank.pretrain.pictures import Pictures, normalise
from patchrank.tower import VisionTower

logger = logging.getLogger(__name__)

SHARD = 256
"""Pictures of one file."""
SCHEMA = 1
_BATCH = 32


class FeatureCache:
    """Features of one tower by picture.

    Args: folder of the files; tower, frozen; weights_hash, the tower's; preprocess, what pictures go through.
    """

    def __init__(self, folder: Path, tower: VisionTower, weights_hash: str, preprocess: Preprocess) -> None:
        self.folder = Path(folder)
        self._tower, self._hash, self._preprocess = tower, weights_hash, preprocess

    def features(self, dataset: Dataset) -> Tensor:
        """Features (N, D) float32, not normalised, of whole pictures in the data set's order; NaN where one is broken.

        A picture that is there several times is looked at once. What the folder lacks is computed and kept; a damaged
        file is computed again.
        """
        every = _names(dataset)
        number_of = {name: number for number, name in reversed(list(enumerate(every)))}
        names = list(dict.fromkeys(every))
        found = {stretch: self._read(self._request(names, stretch)) for stretch in _stretches(names)}
        absent = [stretch for stretch, feature_nD in found.items() if feature_nD is None]
        pictures = Pictures(dataset, self._preprocess, max_bytes=0)
        for stretch in tqdm(absent, desc=f"features of {dataset.name}", unit=f" x {SHARD}", disable=not absent):
            found[stretch] = self._compute(pictures, [number_of[names[place]] for place in stretch])
            self._write(self._request(names, stretch), found[stretch])
        place_of = {name: place for place, name in enumerate(names)}
        return torch.cat(list(found.values()))[[place_of[name] for name in every]]

    @torch.no_grad()
    def _compute(self, pictures: Pictures, numbers: list[int]) -> Tensor:
        feature_nD = torch.full((len(numbers), self._tower.config.feature_dim), torch.nan)
        device = next(self._tower.parameters()).device
        for first in range(0, len(numbers), _BATCH):
            image_BCHW, good = pictures.batch(numbers[first : first + _BATCH])
            if good:
                found_BD = self._tower(normalise(image_BCHW, self._preprocess).to(device))
                feature_nD[[numbers.index(number) for number in good]] = found_BD.float().cpu()
        return feature_nD

    def _request(self, names: list[str], stretch: range) -> str:
        """What the features of one stretch depend on, as text."""
        own = [names[number] for number in stretch]
        request = dict(schema=SCHEMA, weights_hash=self._hash, preprocess=self._preprocess.to_dict())
        request |= dict(pictures=hashlib.sha256(json.dumps(own).encode()).hexdigest(), num=len(own))
        return json.dumps(request, sort_keys=True)

    def _path(self, request: str) -> Path:
        return self.folder / f"{hashlib.sha256(request.encode()).hexdigest()[:24]}.safetensors"

    def _read(self, request: str) -> Tensor | None:
        """Features (n, D) of a whole file that answers this request; None otherwise."""
        path = self._path(request)
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                feature_nD, metadata = file.get_tensor("feature"), file.metadata()
            if metadata["request"] == request and metadata["sha256"] == _digest(feature_nD):
                return feature_nD
        except (OSError, SafetensorError, KeyError, TypeError):
            pass
        logger.warning("%s: damaged; its features are computed again", path)
        return None

    def _write(self, request: str, feature_nD: Tensor) -> None:
        write_tensors(self._path(request), {"feature": feature_nD}, {"request": request, "sha256": _digest(feature_nD)})


def _names(dataset: Dataset) -> list[str]:
    """`<data set>:<id>` of every picture, as a mixture has it, so that mixtures share the features of their parts."""
    mixed = "+" in dataset.name
    return [item.id if mixed else f"{dataset.name}:{item.id}" for item in dataset.images]


def _stretches(names: list[str]) -> list[range]:
    """Runs of at most SHARD pictures of one data set each."""
    found, start = [], 0
    for _, own in groupby(names, lambda name: name.partition(":")[0]):
        stop = start + len(list(own))
        found += [range(first, min(first + SHARD, stop)) for first in range(start, stop, SHARD)]
        start = stop
    return found


def _digest(feature_nD: Tensor) -> str:
    return hashlib.sha256(feature_nD.contiguous().numpy().tobytes()).hexdigest()
