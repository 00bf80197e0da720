"""Search over a data set: shards of images, each written when it is whole; any rank, any restart, the same bytes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from patchrank.data import BrokenImage
from patchrank.errors import UserError
from patchrank.search.criteria import Target, build_damage
from patchrank.search.ranking import Ranking
from patchrank.search.store import begin, complete, read_shard, shard_path, write_shard
from patchrank.search.strategies import Options, strategy_by_name
from patchrank.search.variants import prepare
from patchrank.spec import PruneSpec
from patchrank.tower import VisionTower


@dataclass(frozen=True)
class Job:
    """All that a shard's computation needs; the same on every rank."""

    tower: VisionTower
    image: Callable[[object], Tensor]
    """Item -> image (3, H, W) float; raises BrokenImage."""
    spec: PruneSpec
    criterion: str
    strategy: str
    options: Options
    seed: int
    chunk: int
    logits: Callable[[Tensor], Tensor] | None = None
    device: str = "cpu"


def seed_of(seed: int, image_id: str) -> int:
    """Seed of one image: independent of its place in the run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{image_id}".encode()).digest()[:7], "big")


def spread(items: Sequence, limit: int | None) -> list:
    """The first `limit` items in order of a hash of their ids: spread over the classes, smaller limits nested.

    Raises: UserError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: must be 1 or more")
    by_hash = sorted(items, key=lambda item: hashlib.sha256(item.id.encode()).digest())
    return by_hash[:limit]


def search_image(job: Job, item) -> Ranking:
    """Golden ranking of one image. Raises: BrokenImage."""
    image_CHW = job.image(item).to(job.device)
    with torch.no_grad():
        variants = prepare(job.tower, image_CHW, job.spec, job.chunk)
        damage = build_damage(job.criterion, Target(variants.dense_D, job.logits, item.label))
        generator = torch.Generator().manual_seed(seed_of(job.seed, item.id))
        return strategy_by_name(job.strategy).run(variants, damage, job.options, generator)


def search_shard(job: Job, items: Sequence, tick: Callable[[], object]) -> tuple[list[str], list[str], list[Ranking]]:
    """Rankings of one shard's images: ids, broken ids, rankings in the order of ids."""
    ids, broken, rankings = [], [], []
    for item in items:
        try:
            rankings.append(search_image(job, item))
            ids.append(item.id)
        except BrokenImage:
            broken.append(item.id)
        tick()
    return ids, broken, rankings


def shards(items: Sequence, size: int) -> Iterator[tuple[int, Sequence]]:
    """(index, items) of each shard."""
    for index, start in enumerate(range(0, len(items), size)):
        yield index, items[start : start + size]


def num_left(items: Sequence, size: int, store: Path) -> int:
    """Images whose shard is not in the store yet; reads names only."""
    return sum(len(part) for index, part in shards(items, size) if not shard_path(store, index).exists())


def run_search(
    job: Job, items: Sequence, request: dict, store: Path, *, rank: int = 0, world: int = 1, quiet: bool = False
) -> bool:
    """Fill this rank's part of the store, skipping whole shards; True for the one process that completed it.

    Raises: RankingMismatch if the store was begun by another request or a shard is damaged; finished shards stay.
    """
    parts = list(shards(items, request["shard_size"]))
    begin(store, request, len(parts))
    present = {index for index, _ in parts if shard_path(store, index).exists()}
    for index in sorted(present):
        read_shard(shard_path(store, index), request)
    mine = [(index, part) for index, part in parts if index % world == rank]
    total = sum(len(part) for _, part in mine)
    left = [(index, part) for index, part in mine if index not in present]
    done = total - sum(len(part) for _, part in left)
    with _bar(job.strategy, total, done, quiet or rank > 0 or not left) as bar:
        for index, part in left:
            write_shard(store, index, request, *search_shard(job, part, bar.update))
    return complete(store, request, len(parts))


def _bar(strategy: str, total: int, done: int, hidden: bool) -> tqdm:
    """Progress in images, always as images/s (never s/image), with the time left; `done` does not count as speed."""
    form = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} images, {rate_noinv_fmt}, {remaining} left"
    return tqdm(total=total, initial=done, unit=" images", bar_format=form, disable=hidden, desc=f"search ({strategy})")
