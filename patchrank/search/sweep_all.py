"""One sweep for several criteria: the features of all windows are computed once, every criterion judges them.

The stores have the same bytes as one `python -m patchrank.search --strategy sweep` per criterion would write.

Letters: W windows, N patches.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from patchrank.data import BrokenImage, Item
from patchrank.errors import UserError
from patchrank.search.criteria import Damage, Target, build_damage
from patchrank.search.plan import Plan
from patchrank.search.ranking import Ranking, ranking_from_score
from patchrank.search.runner import shards
from patchrank.search.store import begin, complete, read_shard, shard_path, write_shard
from patchrank.search.sweep import coverage_mean, windows
from patchrank.search.variants import Variants, prepare


def sweep_all(
    variants: Variants, damages: dict[str, Damage], *, window: int = 1, stride: int = 1
) -> dict[str, Ranking]:
    """The ranking of `sweep` for every damage function, by its name, from one pass over the windows."""
    cover_WN = windows(variants.state.grid, window, stride).to(variants.state.x_BLC.device)
    feature_WD = variants.features(~cover_WN)
    return {name: ranking_from_score(coverage_mean(damage(feature_WD), cover_WN)) for name, damage in damages.items()}


def run_sweep_all(plans: dict[str, Plan], stores: dict[str, Path], *, quiet: bool = False) -> None:
    """Fill one store per criterion; shards that are there are kept, so a killed run goes on where it stopped.

    Args: plans by criterion, of the strategy "sweep", equal in all but the criterion; stores by criterion.
    Raises: UserError for plans that differ in more; RankingMismatch for a store that another request began.
    """
    first = _one_pass(plans)
    parts = list(shards(first.items, first.request["shard_size"]))
    for name, plan in plans.items():
        begin(stores[name], plan.request, len(parts))
    form = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} images, {rate_noinv_fmt}, {remaining} left"
    with tqdm(total=len(first.items), bar_format=form, unit=" images", disable=quiet, desc="sweep") as bar:
        for index, part in parts:
            left = [name for name in plans if not _is_there(stores[name], index, plans[name].request)]
            found = _search_shard({name: plans[name] for name in left}, part) if left else None
            for name in left:
                ids, broken, rankings = found
                write_shard(stores[name], index, plans[name].request, ids, broken, rankings[name])
            bar.update(len(part))
    for name, plan in plans.items():
        complete(stores[name], plan.request, len(parts))


def _one_pass(plans: dict[str, Plan]) -> Plan:
    """The first plan, if one pass serves all."""
    first, *others = plans.values()
    for plan in (first, *others):
        differing = [key for key, value in plan.request.items() if key != "criterion" and value != first.request[key]]
        if differing or plan.job.strategy != "sweep":
            raise UserError(f"one sweep for several criteria: the plans differ in {', '.join(differing) or 'strategy'}")
    return first


def _is_there(store: Path, index: int, request: dict) -> bool:
    """Whether the store has this shard. Raises: RankingMismatch if it is damaged or of another request."""
    path = shard_path(store, index)
    if path.exists():
        read_shard(path, request)
    return path.exists()


def _search_shard(plans: dict[str, Plan], items: Sequence[Item]) -> tuple[list[str], list[str], dict[str, list]]:
    """Ids, broken ids, and every criterion's rankings in the order of ids."""
    ids, broken, rankings = [], [], {name: [] for name in plans}
    for item in items:
        try:
            found = _search_image(plans, item)
        except BrokenImage:
            broken.append(item.id)
            continue
        ids.append(item.id)
        for name, ranking in found.items():
            rankings[name].append(ranking)
    return ids, broken, rankings


def _search_image(plans: dict[str, Plan], item: Item) -> dict[str, Ranking]:
    job = next(iter(plans.values())).job
    image_CHW = job.image(item).to(job.device)
    with torch.no_grad():
        variants = prepare(job.tower, image_CHW, job.spec, job.chunk)
        damages = {
            name: build_damage(plan.job.criterion, Target(variants.dense_D, plan.job.logits, item.label))
            for name, plan in plans.items()
        }
        return sweep_all(variants, damages, window=job.options.window, stride=job.options.stride)
