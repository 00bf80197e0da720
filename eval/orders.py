"""Where the orders that reports compare come from: search strategies, ranking stores, scorers that cost nothing.

Letters: R random draws, N patches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from patchrank.scorers import SCORERS
from patchrank.search.curves import free_order
from patchrank.search.plan import Plan
from patchrank.search.probes import covering_scores
from patchrank.search.store import RankingMismatch, RankingStore, open_store
from patchrank.search.strategies import STRATEGIES, Options
from patchrank.search.variants import Variants
from patchrank.tokens import rank


@dataclass(frozen=True)
class Entry:
    """A strategy of `patchrank.search.strategies` with its options."""

    strategy: str
    options: Options = field(default_factory=Options)


EXACT = "greedy-1"
ENTRIES: dict[str, Entry] = {
    EXACT: Entry("greedy"),
    "greedy-8": Entry("greedy", Options(step=8)),
    "greedy-16-decay": Entry("greedy", Options(step=16, decay=True)),
    **{name: Entry(name) for name in STRATEGIES if name != "greedy"},
}
"""Row name -> what is searched; every strategy is in it."""


def _suppress_order(variants: Variants, seed: int) -> Tensor:
    return rank(covering_scores(variants, 1, torch.Generator().manual_seed(seed)))[0]


def _scorer(name: str) -> Callable[[Variants, int], Tensor]:
    return lambda variants, seed: free_order(variants, name, seed)


FREE: dict[str, Callable[[Variants, int], Tensor]] = {
    **{name: _scorer(name) for name in SCORERS},
    "suppress": _suppress_order,
}
"""Name -> order (N,) of a scorer that evaluates nothing, by image and seed; "suppress" has random priorities."""
DRAWN = ("random", "checkerboard", "suppress")
"""Those that draw, so that several draws are averaged."""
NUM_DRAWS = 4


def free_names(num_prefix: int) -> list[str]:
    """The free scorers that a tower with so many prefix tokens can have."""
    return [name for name in FREE if num_prefix > 0 or name != "class-attention"]


def free_orders(variants: Variants, name: str, seed: int) -> Tensor:
    """Orders (R, N) int64 of a free scorer: R = 4 draws where it draws, else one."""
    draws = NUM_DRAWS if name in DRAWN else 1
    return torch.stack([FREE[name](variants, seed + draw) for draw in range(draws)])


def entry_of(request: dict) -> str:
    """Row name of a store's request. Raises: RankingMismatch for options that no row has."""
    for name, entry in ENTRIES.items():
        same = request["strategy"] == entry.strategy
        if same and request["options"] == STRATEGIES[entry.strategy].options(entry.options):
            return name
    raise RankingMismatch(
        f"a store of {request['strategy']} with options {request['options']}: no row of this table; "
        f"the rows are {', '.join(ENTRIES)}"
    )


def read_stores(folders: Sequence[Path], plan: Plan, partial: bool) -> list[RankingStore]:
    """Stores of this model, cut and data set. Args: partial: accept unfinished ones.

    Raises: RankingMismatch naming what differs; rest, criterion and strategy are free.
    """
    stores = []
    for folder in folders:
        asked = plan.request
        store = open_store(folder, weights_hash=asked["weights_hash"], layer=asked["layer"], partial=partial)
        fields = ["data", "split", "num_patches", "seed"]
        fields += ["merge_norm"] if store.request["rest"] == "fold" else []
        for name in fields:
            if store.request[name] != asked[name]:
                raise RankingMismatch(
                    f"{folder}: made with {name.replace('_', ' ')} {store.request[name]}, not {asked[name]}; "
                    "search again, or give the flags that it was made with"
                )
        entry_of(store.request)
        stores.append(store)
    return stores


def by_image(store: RankingStore) -> dict[str, Tensor]:
    """Order (N,) int64 of every image of a store."""
    return {image_id: order_N.long() for image_id, order_N in zip(store.ids, store.order_BN)}
