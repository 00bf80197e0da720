"""Features of many methods on the same images, each computed once: a folder of small files that check themselves.

A file holds one method's features of one run of SHARD images, keyed by the tower's weights, the method, what it
costs, the transform and the hash of the image list; so a smaller `--limit` reuses what a larger one left, and a kill
costs one run. Pictures are decoded once for all methods.

Letters: I images, B batch, D feature.
"""

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from eval.records import text_sha256
from eval.shared_prefix import features
from patchrank.atomic import write_tensors
from patchrank.data import Dataset, Item, batches
from patchrank.loading import LoadedClip
from patchrank.provenance import versions
from patchrank.search.plan import threads

logger = logging.getLogger(__name__)

SHARD = 64
"""Images of one file: what a kill can cost, and the grain in which limits share work."""
SCHEMA = 1
_AGREES = 1 - 1e-4
"""Cosine above which a feature counts as the cached one; batch size and threads change the last digits only."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """What one method says of a list of images."""

    feature_ID: Tensor
    """float32, not normalised, in the order of the list, broken pictures left out."""
    items: list[Item]
    """Of the rows of `feature_ID`."""
    broken: list[str]

    @property
    def ids(self) -> np.ndarray:
        """Ids (I,) of the rows, as text."""
        return np.array([item.id for item in self.items], dtype=np.str_)

    def cosines(self, dense: "Features") -> np.ndarray:
        """Cosine (I,) float32 of every image's feature to another of it."""
        return F.cosine_similarity(self.feature_ID, dense.feature_ID, dim=-1).numpy().astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way through the tower, ready to run."""

    name: str
    macs: float = 1.0
    """Budget asked for, as a share of the dense MACs."""
    keep: float | None = None
    module: nn.Module
    image_macs: int


class FeatureStore:
    """Features by request, on disk; a file that is damaged or answers another request is computed again.

    Args: folder; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def _path(self, request: dict) -> Path:
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        return self.folder / request["method"] / f"{digest[:24]}.safetensors"

    def read(self, request: dict) -> tuple[Tensor, Tensor] | None:
        """Features (n, D) float32 and their places (n,) int64 in the run of images, or None."""
        if self.folder is None or not self._path(request).is_file():
            return None
        path = self._path(request)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                feature_nD, place_n = file.get_tensor("feature"), file.get_tensor("place")
            if metadata["sha256"] == _digest(feature_nD, place_n) and json.loads(metadata["request"]) == request:
                return feature_nD, place_n
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            pass
        logger.warning("%s: damaged; its features are computed again", path)
        return None

    def write(self, request: dict, feature_nD: Tensor, place_n: Tensor) -> None:
        """Keep one run; atomic."""
        if self.folder is not None:
            metadata = {"request": json.dumps(request, sort_keys=True), "sha256": _digest(feature_nD, place_n)}
            write_tensors(self._path(request), {"feature": feature_nD, "place": place_n}, metadata)

    def forget(self, request: dict) -> None:
        """Delete all runs that differ from a request in their images alone."""
        for path in self._path(request).parent.glob("*.safetensors"):
            try:
                with safe_open(path, framework="pt") as file:
                    other = json.loads(file.metadata()["request"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError):
                continue
            if other | {"images": ""} == request | {"images": ""}:
                path.unlink()


def _digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def request_of(clip: LoadedClip, dataset: Dataset, method: Method, items: list[Item], device: str) -> dict:
    """What the features of one run depend on."""
    return {
        "schema": SCHEMA,
        "weights_hash": clip.weights_hash,
        "preprocess": clip.preprocess.to_dict(),
        "method": method.name,
        "macs": method.macs,
        "image_macs": method.image_macs,
        "data": dataset.name,
        "root": "" if dataset.root is None else dataset.root.name,
        "images": text_sha256(item.id for item in items),
        "device": torch.device(device).type,
        "versions": _versions(),
    }


@cache
def _versions() -> dict[str, str]:
    """Of what computes features; reading them from the packages' metadata takes a while."""
    return {name: version for name, version in versions().items() if name in ("torch", "patchrank")}


@torch.no_grad()
def extract(
    clip: LoadedClip,
    dataset: Dataset,
    items: list[Item],
    methods: list[Method],
    store: FeatureStore,
    *,
    batch_size: int = 32,
    device: str = "cpu",
) -> list[Features]:
    """Features of `items` by every method, in the order of `methods`; what the store has is not computed.

    The first cached run of every method is checked against its first image, computed anew: if the code behind a
    method's name has changed, nothing of it is taken from the store.
    """
    stale, rows = set(), [[] for _ in methods]
    form = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} images, {elapsed} so far, {remaining} left"
    with tqdm(total=len(items), bar_format=form, desc=f"features ({len(methods)} rows)", disable=None) as bar:
        for start in range(0, len(items), SHARD):
            run = replace(dataset, images=items[start : start + SHARD])
            requests = [request_of(clip, dataset, method, run.images, device) for method in methods]
            found = [None if number in stale else store.read(request) for number, request in enumerate(requests)]
            if start == 0:
                stale = _stale(clip, run, methods, found, device)
                for number in stale:
                    store.forget(requests[number])
                found = [None if number in stale else one for number, one in enumerate(found)]
            absent = {number: method for number, method in enumerate(methods) if found[number] is None}
            if absent:
                for number, (feature_nD, place_n) in _compute(clip, run, absent, batch_size, device).items():
                    store.write(requests[number], feature_nD, place_n)
                    found[number] = feature_nD, place_n
            for row, (feature_nD, place_n) in zip(rows, found):
                row.append((feature_nD, start + place_n))
            bar.update(len(run.images))
    return [_joined(row, items) for row in rows]


def _stale(clip: LoadedClip, run: Dataset, methods: list[Method], found: list, device: str) -> set[int]:
    """Numbers of methods whose first cached feature is not what the method says today."""
    cached = {number: one for number, one in enumerate(found) if one is not None and len(one[1])}
    stale = set()
    for place in {int(place_n[0]) for _, place_n in cached.values()}:
        checked = {number: methods[number] for number, one in cached.items() if int(one[1][0]) == place}
        one_image = replace(run, images=[run.images[place]])
        for number, (feature_nD, _) in _compute(clip, one_image, checked, 1, device).items():
            first_D = cached[number][0][0]
            if len(feature_nD) == 0 or F.cosine_similarity(feature_nD[0], first_D, dim=-1) < _AGREES:
                logger.warning("%s: its cached features are of an older code; computed again", methods[number].name)
                stale.add(number)
    return stale


def _compute(
    clip: LoadedClip, run: Dataset, methods: dict[int, Method], batch_size: int, device: str
) -> dict[int, tuple[Tensor, Tensor]]:
    """Number -> features (n, D) float32 on the CPU and places (n,) int64 of the readable pictures of a run.

    On a CPU its batches go side by side, each on its share of the threads: that scales better than threads in a call.
    """
    modules = {number: method.module for number, method in methods.items()}
    starts = range(0, len(run.images), batch_size)
    workers = min(torch.get_num_threads(), len(starts)) if torch.device(device).type == "cpu" else 1
    one = partial(_one_batch, clip, run, modules, batch_size, device)
    with threads(torch.get_num_threads() // workers), ThreadPoolExecutor(workers) as pool:
        found = [batch for batch in pool.map(one, starts) if batch is not None]
    place_n = torch.tensor([place for places, _ in found for place in places], dtype=torch.int64)
    features_of = {number: [feature[number] for _, feature in found] for number in methods}
    return {
        number: (torch.cat(parts) if parts else torch.zeros(0, 0), place_n) for number, parts in features_of.items()
    }


@torch.no_grad()
def _one_batch(
    clip: LoadedClip, run: Dataset, modules: dict[int, nn.Module], batch_size: int, device: str, start: int
) -> tuple[list[int], dict[int, Tensor]] | None:
    """Places and features of the readable pictures start .. start + batch_size - 1 of a run; None without any."""
    window = run.images[start : start + batch_size]
    for ids, image_BCHW, _ in batches(run, clip.preprocess, batch_size, start, start + batch_size):
        good = set(ids)
        found = features(clip.tower, modules, image_BCHW.to(device))
        places = [start + place for place, item in enumerate(window) if item.id in good]
        return places, {number: feature_BD.cpu() for number, feature_BD in found.items()}
    return None


def _joined(row: list[tuple[Tensor, Tensor]], items: list[Item]) -> Features:
    """All runs of one method."""
    parts = [feature_nD for feature_nD, _ in row if len(feature_nD)]
    places = torch.cat([place_n for _, place_n in row]).tolist()
    good = set(places)
    return Features(
        feature_ID=torch.cat(parts) if parts else torch.zeros(0, 0),
        items=[items[place] for place in places],
        broken=[item.id for place, item in enumerate(items) if place not in good],
    )
