"""The measuring of `search-cost`: orders and their worth first, then, on a quiet machine, seconds.

Both phases write a journal record per image, rest and ranking, so a kill costs one image and a second run adds what is
missing: `--no-time` first, the timing later.

Letters: N patches, I images.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from eval.journal import Journal
from eval.orders import ENTRIES, EXACT, free_names, free_orders
from eval.quality import CURVE_KEEPS, Worth, dense_hit, judge
from eval.uncached import cached_round, integrate, lengths, timed, uncached_round
from patchrank.data import BrokenImage, Item
from patchrank.metrics import kendall_tau
from patchrank.scorers import mean_rank_prior
from patchrank.search.criteria import Damage, Target, build_damage
from patchrank.search.plan import Plan
from patchrank.search.ranking import Ranking
from patchrank.search.runner import Job, seed_of
from patchrank.search.strategies import strategy_by_name
from patchrank.search.variants import Variants, prepare
from patchrank.tokens import rank

UNCACHED = "greedy-1-uncached"
WARM_UP = ("regression", "gradient")
Tick = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """What is measured, per `rest`."""

    plans: dict[str, Plan]
    images: dict[str, list[Item]]
    names: list[str]
    """Rows of `ENTRIES`, exact greedy first."""
    stored: dict[tuple[str, str], dict[str, Tensor]]
    """(rest, row) -> image id -> order (N,), from ranking stores."""
    stored_macs: dict[tuple[str, str], int]
    """(rest, row) -> MACs of such a search, counted on the stand-in tower."""

    def job(self, rest: str, name: str) -> Job:
        """The search of one row."""
        entry = ENTRIES[name]
        return replace(self.plans[rest].job, strategy=entry.strategy, options=entry.options)

    def free(self, rest: str) -> list[str]:
        """Free scorers that this tower can have."""
        return free_names(self.plans[rest].clip.tower.config.num_prefix)


def search(job: Job, image_CHW: Tensor, item: Item) -> tuple[Ranking, int]:
    """Ranking of one image and the MACs it took, from the pixels on."""
    variants, damage = ready(job, image_CHW, item)
    generator = torch.Generator().manual_seed(seed_of(job.seed, item.id))
    ranking = strategy_by_name(job.strategy).run(variants, damage, job.options, generator)
    return ranking, variants.macs


def ready(job: Job, image_CHW: Tensor, item: Item) -> tuple[Variants, Damage]:
    """An image at the cut and what hurts it."""
    variants = prepare(job.tower, image_CHW, job.spec, job.chunk)
    return variants, build_damage(job.criterion, Target(variants.dense_D, job.logits, item.label))


@torch.no_grad()
def measure_worth(bench: Bench, journal: Journal, tick: Tick) -> list[str]:
    """Fill the journal with orders and their worth; returns ids of broken images. `tick`: once per image and rest."""
    broken = []
    for item in every_image(bench):
        for rest in bench.plans:
            if item not in bench.images[rest]:
                continue
            wanted = [*bench.names, *bench.free(rest)]
            if any((item.id, rest, name) not in journal for name in wanted):
                try:
                    image_CHW = _image(bench.plans[rest].job, item)
                except BrokenImage:
                    broken.append(item.id)
                    break
                _measure_image(bench, journal, rest, item, image_CHW)
            tick()
    return broken


def every_image(bench: Bench) -> list[Item]:
    """Images of any `rest`, in the order of the run."""
    items = next(iter(bench.plans.values())).items
    return [item for item in items if any(item in images for images in bench.images.values())]


def _image(job: Job, item: Item) -> Tensor:
    return job.image(item).to(job.device)


def _measure_image(bench: Bench, journal: Journal, rest: str, item: Item, image_CHW: Tensor) -> None:
    job = bench.plans[rest].job
    variants = prepare(job.tower, image_CHW, job.spec, job.chunk)
    if (item.id, "", "dense") not in journal:
        journal.add({"image": item.id, "rest": "", "ranking": "dense", "hit": dense_hit(job, variants, item.label)})
    for name in bench.names:
        if (item.id, rest, name) not in journal:
            order_N, macs = _order(bench, rest, name, item, image_CHW)
            exact = journal.get(item.id, rest, EXACT)
            tau = 1.0 if exact is None else kendall_tau(order_N, torch.tensor(exact["order"]))
            worth = judge(job, variants, item.label, order_N.unsqueeze(0), CURVE_KEEPS)
            journal.add(_record(item, rest, name, worth, tau) | {"macs": macs, "order": order_N.tolist()})
    exact_N = torch.tensor(journal.get(item.id, rest, EXACT)["order"])
    records = []
    for name in bench.free(rest):
        if (item.id, rest, name) not in journal:
            order_RN = free_orders(variants, name, seed_of(job.seed, item.id))
            worth = judge(job, variants, item.label, order_RN, CURVE_KEEPS)
            tau = sum(kendall_tau(order_N, exact_N) for order_N in order_RN.cpu()) / len(order_RN)
            records.append(_record(item, rest, name, worth, tau))
    journal.add(*records)


def _record(item: Item, rest: str, name: str, worth: Worth, tau: float) -> dict:
    return {"image": item.id, "rest": rest, "ranking": name, "tau": tau} | asdict(worth)


def _order(bench: Bench, rest: str, name: str, item: Item, image_CHW: Tensor) -> tuple[Tensor, int]:
    """Order (N,) int64 and MACs: from a store where there is one, else searched."""
    stored = bench.stored.get((rest, name))
    if stored is not None:
        return stored[item.id], bench.stored_macs[rest, name]
    ranking, macs = search(bench.job(rest, name), image_CHW, item)
    return ranking.order_N.long(), macs


@torch.no_grad()
def prior_worth(bench: Bench, journal: Journal, rest: str) -> dict[str, dict]:
    """Records of the mean-rank prior by image: the mean exact rank of each position over all *other* images.

    Empty with fewer than two images. It is computed anew each time, since it changes with every image that is added.
    """
    known = [item for item in bench.images[rest] if (item.id, rest, EXACT) in journal]
    if len(known) < 2:
        return {}
    order_IN = torch.tensor([journal.get(item.id, rest, EXACT)["order"] for item in known])
    job, records = bench.plans[rest].job, {}
    for row, item in enumerate(known):
        variants = prepare(job.tower, _image(job, item), job.spec, job.chunk)
        others = torch.arange(len(known)) != row
        order_1N = rank(mean_rank_prior(order_IN[others]).unsqueeze(0))
        worth = judge(job, variants, item.label, order_1N, CURVE_KEEPS)
        records[item.id] = _record(item, rest, "mean-rank", worth, kendall_tau(order_1N[0], order_IN[row]))
    return records


@torch.no_grad()
def measure_seconds(
    bench: Bench, worths: Journal, journal: Journal, num_images: int, full_image: bool, tick: Tick
) -> None:
    """Time every row on the first images of each `rest`, all rows on one image, then the next.

    Exact greedy, cached and not, by rounds at every 16th length, integrated (`full_image`: the first image also at
    every length); the others in full, from pixels to order. `tick`: once per image and rest.
    """
    warm = False
    for rest, item in timed_images(bench, num_images):
        image_CHW = _image(bench.plans[rest].job, item)
        exact_N = torch.tensor(worths.get(item.id, rest, EXACT)["order"])
        is_full = full_image and item == bench.images[rest][0]
        kinds = [(UNCACHED, "rounds"), (EXACT, "rounds"), *((name, "search") for name in bench.names if name != EXACT)]
        kinds += [(EXACT, "full"), (UNCACHED, "full")] if is_full else []
        left = [(name, kind) for name, kind in kinds if (item.id, rest, name, kind) not in journal]
        if left and not warm:
            _warm_up(bench, rest, item, image_CHW, exact_N)
            warm = True
        for name, kind in left:
            seconds = _seconds(bench, rest, name, kind, item, image_CHW, exact_N)
            journal.add({"image": item.id, "rest": rest, "ranking": name, "kind": kind, "seconds": seconds})
        tick()


def timed_images(bench: Bench, num_images: int) -> list[tuple[str, Item]]:
    """(rest, image) of the timing, both kinds of `rest` on one image, then the next."""
    first = {rest: images[:num_images] for rest, images in bench.images.items()}
    return [(rest, item) for item in every_image(bench) for rest in bench.plans if item in first[rest]]


def _seconds(bench: Bench, rest: str, name: str, kind: str, item: Item, image_CHW: Tensor, exact_N: Tensor) -> float:
    job = bench.job(rest, EXACT if name == UNCACHED else name)
    if kind == "search":
        return timed(lambda: search(job, image_CHW, item), job.device)[1]
    (variants, damage), once = timed(lambda: ready(job, image_CHW, item), job.device)
    found = {}
    for num_alive in lengths(variants.num_patches, 1 if kind == "full" else 16):
        if name == UNCACHED:
            call = uncached_round(variants, image_CHW, damage, exact_N, num_alive)
        else:
            call = cached_round(variants, damage, exact_N, num_alive)
        found[num_alive] = timed(call, job.device)[1]
    if kind == "full":
        return once + sum(found.values())
    return once + integrate(found, variants.num_patches, 1 if name == UNCACHED else job.chunk)


def _warm_up(bench: Bench, rest: str, item: Item, image_CHW: Tensor, exact_N: Tensor) -> None:
    """Pay for memory and kernels before the first clock is read."""
    for name in WARM_UP:
        search(bench.job(rest, name), image_CHW, item)
    variants, damage = ready(bench.plans[rest].job, image_CHW, item)
    num_alive = min(variants.chunk, variants.num_patches)
    uncached_round(variants, image_CHW, damage, exact_N, num_alive)()
