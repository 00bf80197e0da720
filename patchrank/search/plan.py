"""From a config to everything a search needs: model, images, the job, and the request that the store records."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from patchrank.classifier import Classifier, classifier
from patchrank.data import Dataset, Item, load_dataset
from patchrank.errors import UserError
from patchrank.loading import LoadedClip, load_clip
from patchrank.provenance import versions
from patchrank.search.config import SearchConfig
from patchrank.search.runner import Job, spread
from patchrank.search.store import SCHEMA, fingerprint
from patchrank.search.strategies import strategy_by_name
from patchrank.spec import PruneSpec


@dataclass(frozen=True)
class Plan:
    """A search that is ready to run; equal configs give equal plans in every process."""

    clip: LoadedClip
    dataset: Dataset
    items: list[Item]
    job: Job
    request: dict
    note: str = ""
    """Why there are no class answers, where the data set has classes but the model cannot name them."""


def place() -> tuple[int, int]:
    """(rank, world) from the variables that torchrun sets; (0, 1) without them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def threads(num: int | None) -> Iterator[None]:
    """Compute with `num` CPU threads (None: as it is), then go back to the former number."""
    former = torch.get_num_threads()
    if num is not None:
        torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def make_plan(config: SearchConfig, clip: LoadedClip | None = None, dataset: Dataset | None = None) -> Plan:
    """Load what is not given, check the (already checked) config against it, and write down the request.

    Raises: UserError for a value that does not fit the model or the data.
    """
    clip = load_clip(config.model, config.pretrained, config.device) if clip is None else clip
    dataset = load_dataset(config.data, root=config.data_root, split=config.split) if dataset is None else dataset
    spec = _spec(config, clip.tower.config.num_layers)
    items = spread(dataset.images, config.limit)
    logits, note = _classes(config, clip, dataset)
    job = Job(
        tower=clip.tower,
        image=lambda item: clip.preprocess(dataset.open(item.id)),
        spec=spec,
        criterion=config.criterion,
        strategy=config.strategy,
        options=config.options,
        seed=config.seed,
        chunk=config.chunk,
        logits=logits,
        device=config.device,
    )
    return Plan(clip, dataset, items, job, _request(config, clip, spec, items), note)


def _classes(config: SearchConfig, clip: LoadedClip, dataset: Dataset) -> tuple[Classifier | None, str]:
    """The classifier; `preservation` does without one, so there its absence is a note, not an error."""
    try:
        return classifier(clip, dataset), ""
    except UserError as error:
        if config.criterion != "preservation":
            raise
        return None, str(error)


def _spec(config: SearchConfig, num_layers: int) -> PruneSpec:
    layer = num_layers // 4 if config.layer is None else config.layer
    if not 0 <= layer < num_layers:
        raise UserError(f"--layer {layer}: outside this tower of {num_layers} blocks; use 0 to {num_layers - 1}")
    return PruneSpec(cuts=((layer, 1.0),), rest=config.rest, merge_norm=config.merge_norm)


def _request(config: SearchConfig, clip: LoadedClip, spec: PruneSpec, items: list[Item]) -> dict:
    return {
        "schema": SCHEMA,
        "model": config.model,
        "pretrained": Path(config.pretrained).name,
        "weights_hash": clip.weights_hash,
        "data": config.data,
        "split": config.split,
        "images": fingerprint({"ids": [item.id for item in items]}),
        "num_patches": clip.tower.config.num_patches,
        "layer": spec.cuts[0][0],
        "rest": config.rest,
        "merge_norm": config.merge_norm,
        "criterion": config.criterion,
        "strategy": config.strategy,
        "options": strategy_by_name(config.strategy).options(config.options),
        "seed": config.seed,
        "chunk": config.chunk,
        "shard_size": config.shard_size,
        "threads": torch.get_num_threads(),
        "device": config.device,
        "versions": versions(),
    }
