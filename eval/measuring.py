"""What every accuracy command shares: its flags, the model with its methods, and a record from what came out.

A command says what to judge (`Bench.subject`), skips what its folder holds, takes features from `Bench.features` and
turns them into metrics. Letters: I images, D feature.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from eval.features import Features, FeatureStore, Method, extract
from eval.records import DENSE, Record, Subject, find_record, text_sha256, write_record
from eval.rival_files import parse_files
from eval.rivals import OURS, RIVALS, build
from eval.text_cache import with_text_cache
from patchrank.data import Dataset, Item
from patchrank.errors import UserError
from patchrank.loading import LoadedClip, load_clip
from patchrank.macs import dense_macs, pruned_macs
from patchrank.presets import DEFAULT_MACS, one_cut
from patchrank.provenance import command, machine, versions
from patchrank.search.config import SearchConfig
from patchrank.search.config import check as check_shared
from patchrank.search.plan import threads
from patchrank.search.runner import spread
from patchrank.tower import TowerConfig


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Flags that every accuracy command has."""

    model: str = "embedded"
    """Open_clip name, timm name, folder, file, or "embedded": the small model in the package."""
    pretrained: str = ""
    """Open_clip tag or checkpoint file of --model."""
    data_root: Path | None = None
    """Folder that holds the data sets; without it $PATCHRANK_ASSETS/data."""
    limit: int | None = 200
    """Images to judge, spread over the classes; smaller limits are nested in larger ones. None: all."""
    methods: tuple[str, ...] = (DENSE, OURS)
    """Methods to judge: "dense" and rows of the rivals' table; dense is always there."""
    macs: tuple[float, ...] = ()
    """Budgets: shares of the dense image tower's MACs. Without --macs and --keep: 0.7."""
    keep: tuple[float, ...] = ()
    """Budgets said as the share of patches that one dropping cut leaves at a quarter of the depth; not with --macs."""
    files: tuple[str, ...] = ()
    """Trained or searched files that some rows need, as dtem=out/dtem; rows without theirs are skipped and say so."""
    batch_size: int = 32
    """Images per call."""
    threads: int | None = None
    """CPU threads; without it torch's default."""
    device: str = "cpu"
    """Where to compute: cpu or cuda."""
    cache: Path | None = Path("out/features")
    """Folder of cached features; None keeps none."""
    seed: int = 0
    """Seed of hold-outs and few-shot draws; rivals that draw keep their own."""


@dataclass(frozen=True, kw_only=True)
class Unreached:
    """A method that a budget or a tower rules out."""

    method: str
    macs: float
    reason: str


@dataclass(kw_only=True)
class Bench:
    """A model, its methods at every budget, and where results go."""

    config: MeasureConfig
    clip: LoadedClip
    methods: list[Method]
    """Dense first."""
    unreached: list[Unreached] = field(default_factory=list)
    store: FeatureStore

    def choose(self, dataset: Dataset) -> list[Item]:
        """The images to judge, as --limit says."""
        return spread(dataset.images, self.config.limit)

    def features(self, dataset: Dataset, items: list[Item], methods: list[Method]) -> list[Features]:
        """Features of `items` by `methods`."""
        config = self.config
        options = dict(batch_size=config.batch_size, device=config.device)
        return extract(self.clip, dataset, items, methods, self.store, **options)

    def subject(self, method: Method, dataset: Dataset, items: list[Item], *, task: str, **said) -> Subject:
        """What is about to be measured. Args: said, further fields: protocol, templates_sha256, settings, ..."""
        names = dataset.class_names
        return Subject(
            dataset=dataset.name,
            model=self.clip.model_name,
            pretrained=Path(self.clip.pretrained).name,
            task=task,
            **_cost_of(method),
            dense_macs=dense_macs(self.clip.tower.config),
            split=dataset.split,
            split_source=dataset.split_source,
            split_sha256=text_sha256([item.id, item.label, *item.captions] for item in dataset.images),
            num_images=len(items),
            images_sha256=text_sha256(item.id for item in items),
            classnames_sha256=text_sha256(names) if names else None,
            weights_hash=self.clip.weights_hash,
            seeds={"draws": self.config.seed, "rivals": 0},
            **said,
        )


def _cost_of(method: Method) -> dict:
    """Fields of `Subject` that tell methods apart."""
    return {name: getattr(method, name) for name in ("macs", "keep", "image_macs")} | {"method": method.name}


@contextmanager
def open_bench(config: MeasureConfig, clip: LoadedClip | None = None) -> Iterator[Bench]:
    """Model and methods of a config, with its threads while the block runs.

    Raises: UserError for unknown names, both --macs and --keep, or a budget that our own method cannot meet.
    """
    check(config)
    # NumPy's and scikit-learn's threads follow torch's.
    with threads(config.threads), threadpool_limits(config.threads):
        clip = load_clip(config.model, config.pretrained, config.device) if clip is None else clip
        clip = with_text_cache(clip, config.cache)
        methods, unreached = build_methods(config, clip)
        yield Bench(config=config, clip=clip, methods=methods, unreached=unreached, store=FeatureStore(config.cache))


def check(config: MeasureConfig) -> None:
    """Check all that needs neither model nor data. Raises: UserError."""
    for name in config.methods:
        if name != DENSE and name not in RIVALS:
            raise UserError(f"--methods {name}: unknown; choose from {', '.join([DENSE, *RIVALS])}")
    if config.macs and config.keep:
        raise UserError("--macs and --keep given: one of them says the budget; leave the other out")
    for name in ("macs", "keep"):
        for value in getattr(config, name):
            if not 0.0 < value <= 1.0:
                raise UserError(f"--{name} {value:g}: must lie in (0, 1]; 0.7 is 70 %")
    if config.batch_size < 1:
        raise UserError(f"--batch-size {config.batch_size}: must be 1 or more")
    shared = "model pretrained data_root limit threads device"
    check_shared(SearchConfig(**{name: getattr(config, name) for name in shared.split()}))


def budgets(config: MeasureConfig, tower: TowerConfig) -> list[tuple[float, float | None]]:
    """(share of the dense MACs, the keep ratio that said it or None), each once."""
    if not config.keep:
        return [(macs, None) for macs in dict.fromkeys(config.macs or (DEFAULT_MACS,))]
    dense = dense_macs(tower)
    return [
        (pruned_macs(tower, one_cut(tower, keep, rest="drop")) / dense, keep) for keep in dict.fromkeys(config.keep)
    ]


def build_methods(config: MeasureConfig, clip: LoadedClip) -> tuple[list[Method], list[Unreached]]:
    """The dense tower, every method at every budget, and what cannot be had, with the reason."""
    tower, files = clip.tower, parse_files(config.files)
    methods, unreached = [Method(name=DENSE, module=tower, image_macs=dense_macs(tower.config))], []
    for macs, keep in budgets(config, tower.config):
        for name in dict.fromkeys(config.methods):
            if name == DENSE:
                continue
            try:
                rival = build(name, tower, macs, files).eval()
            except UserError as error:
                if name == OURS:
                    raise
                unreached.append(Unreached(method=name, macs=macs, reason=str(error)))
                continue
            methods.append(Method(name=name, macs=macs, keep=keep, module=rival, image_macs=rival.macs))
    return methods, unreached


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command found for one subject."""

    metrics: dict[str, float]
    main_metric: str
    sides: dict[str, np.ndarray]
    """Arrays (I, ...), `ids` among them."""
    note: str = ""


Judge = Callable[[Method, Features], Outcome]
"""A method and its features -> its metrics."""


def save(folder: Path, bench: Bench, subject: Subject, outcome: Outcome, dataset: Dataset, broken: list[str]) -> Record:
    """Write the record of a subject with its provenance."""
    record = Record(
        **asdict(subject),
        metrics=outcome.metrics,
        main_metric=outcome.main_metric,
        missing=len(dataset.missing),
        broken=broken,
        note=outcome.note,
        command=command("eval"),
        versions=versions(),
        host=machine() | {"device": bench.config.device},
    )
    return write_record(folder, record, outcome.sides)


def records_of(
    folder: Path, bench: Bench, dataset: Dataset, items: list[Item], start: Callable[[Features], Judge], **said
) -> list[Record]:
    """Records of all methods on the same images, dense first; those that `folder` holds are read, not measured.

    Args: start, called with the unpruned features only if something is to be measured, returns what judges a method;
    said, fields of `Bench.subject`. Raises: UserError if no picture can be read.
    """
    first = bench.subject(bench.methods[0], dataset, items, **said)
    subjects = [replace(first, **_cost_of(method)) for method in bench.methods]
    records = {number: record for number, one in enumerate(subjects) if (record := find_record(folder, one))}
    left = [number for number in range(len(subjects)) if number not in records]
    if left:
        # The unpruned features are what the others are held against, so they are taken in any case.
        needed = list(dict.fromkeys((0, *left)))
        found = dict(zip(needed, bench.features(dataset, items, [bench.methods[number] for number in needed])))
        dense = found[0]
        if not dense.items:
            raise UserError(
                f"--data {dataset.name}: every picture of the {len(items)} is broken; choose more or others"
            )
        judge = start(dense)
        for number in left:
            outcome = judge(bench.methods[number], found[number])
            records[number] = save(folder, bench, subjects[number], outcome, dataset, found[number].broken)
    return [records[number] for number in range(len(subjects))]
