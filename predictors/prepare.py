"""From flags to what a run needs: spec, cached tokens, golden scores; the same for training and calibration."""

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from patchrank.classifier import Classifier, classifier
from patchrank.data import load_dataset
from patchrank.errors import UserError
from patchrank.loading import LoadedClip
from patchrank.macs import pruned_macs
from patchrank.presets import DEFAULT_MACS, Cost, resolve_spec
from patchrank.pretrain.distributed import ALONE, World
from patchrank.pruned import PrunedTower
from patchrank.search.store import RankingMismatch, RankingStore, open_store
from patchrank.spec import PruneSpec, parse_cuts
from patchrank.tower import TowerConfig
from predictors.cache import Tokens, kept_tokens, part, split_items
from predictors.config import Common, TrainConfig
from predictors.costs import cost_with
from predictors.schedules import within
from predictors.views import viewed


class Pruning(Protocol):
    """The flags that say how much is pruned, and how."""

    macs: float | None
    keep: float | None
    cuts: str | None
    layer: int | None
    rest: str


@dataclass(frozen=True)
class Images:
    """Cached tokens of the images to train on and of those to judge by, and the classes they are told by, if any."""

    train: Tokens
    held_out: Tokens
    classify: Classifier | None


def load_images(
    config: Common,
    clip: LoadedClip,
    layer: int,
    store: RankingStore | None = None,
    *,
    quiet: bool = True,
    world: World = ALONE,
) -> Images:
    """Read the data set and run the dense tower over it once; with a store, train on the images that it ranks.

    Raises: UserError for data that cannot be read, too few images, or a batch that the processes cannot share evenly.
    """
    if config.batch_size % world.size:
        raise UserError(f"--batch-size {config.batch_size}: must divide by the {world.size} processes; raise it")
    dataset = load_dataset(config.data, root=config.data_root, split=config.split)
    ranked = None if store is None else set(store.ids)
    train, held_out = split_items(dataset.images, config.limit, config.held_out, ranked)
    seen = viewed(dataset, config.seed) if config.views else dataset
    judged, tokens = (
        kept_tokens(config.cache, clip.tower, part(source, items), clip.preprocess, layer, quiet=quiet, world=world)
        for source, items in ((dataset, held_out), (seen, train))
    )
    if len(tokens) < config.batch_size:
        raise UserError(f"--batch-size {config.batch_size}: there are {len(tokens)} images to train on; lower it")
    try:
        classify = classifier(clip, dataset)
    except UserError:  # a head of other classes than the data set's: agreement is not reported
        classify = None
    return Images(tokens, judged, classify)


def asked_spec(config: Pruning, tower_config: TowerConfig, cost: Cost = pruned_macs) -> PruneSpec:
    """The spec that --macs, --keep or --cuts ask for, with --layer and --rest; without any, the default budget.

    Args: cost counts the MACs of --macs. Raises: UserError.
    """
    cuts = None if config.cuts is None else parse_cuts(config.cuts, tower_config.num_patches)
    nothing_said = config.macs is None and config.keep is None and cuts is None
    macs = DEFAULT_MACS if nothing_said else config.macs
    return resolve_spec(
        tower_config, macs=macs, keep=config.keep, cuts=cuts, layer=config.layer, rest=config.rest, cost=cost
    )


def train_spec(config: TrainConfig, tower_config: TowerConfig, cost: Cost) -> PruneSpec:
    """The spec that the flags ask for; `cost` counts the MACs of --macs with all that is learned. Raises: UserError."""
    spec = asked_spec(config, tower_config, cost)
    if not spec.cuts or spec.cuts[-1][1] == 1.0:
        raise UserError("nothing would be pruned, so there is nothing to train; choose a lower --macs or --keep")
    if config.scorer == "mixer" and len(spec.cuts) > 1:
        raise UserError("--scorer mixer: serves one cut only; give --keep, or choose linear or mlp")
    num_added = config.num_added if config.added else 0
    return replace(spec, where=config.where or spec.where, select=config.select, num_added=num_added)


def range_around(spec: PruneSpec) -> tuple[float, float]:
    """Keep ratios from half to twice what the last cut leaves, at most 0.9 or what it leaves."""
    last = spec.cuts[-1][1]
    return last / 2, max(last, min(2 * last, 0.9))


def at_budget(pruned: PrunedTower, macs: float) -> PruneSpec:
    """The spec of the same parts at another share of the dense MACs.

    Raises: UserError for a share that its cuts cannot reach.
    """
    cost = cost_with(pruned.scorer, pruned.added, pruned.spec.num_added)
    return within(pruned.spec, macs, pruned.config, cost)


def load_store(config: TrainConfig, clip: LoadedClip, spec: PruneSpec) -> RankingStore | None:
    """The ranking store that the losses read, None without one.

    Raises: RankingMismatch for a store of other weights, another layer or grid, or another treatment of the rest.
    """
    if config.store is None:
        return None
    store = open_store(config.store, weights_hash=clip.weights_hash, layer=spec.cuts[0][0])
    num_patches = clip.tower.config.num_patches
    if store.request["num_patches"] != num_patches:
        raise RankingMismatch(
            f"{config.store}: made for {store.request['num_patches']} patches, this tower has {num_patches}; "
            "search again with this model"
        )
    if store.request.get("rest") != spec.rest:
        raise RankingMismatch(
            f"{config.store}: searched with --rest {store.request.get('rest')}; train with the same, or search again"
        )
    return store


def golden_scores(store: RankingStore | None, tokens: Tokens) -> Tensor | None:
    """Golden scores (n, N) of these images; None without a store."""
    return None if store is None else store.score_BN[store.index(tokens.ids)].to(tokens.x_nLC.device)
