"""`python -m eval probe`: a linear classifier on frozen features, the same one for the dense and for pruned towers.

By default it is fitted once, on dense features, and applied unchanged to pruned ones: what a user sees who prunes a
tower behind a classifier that is there already. `--fit own` fits one for every method on its own features.

Letters: I images, D feature, Y classes.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from eval.features import Features, Method
from eval.logistic import Probe, cached_probe, fingerprint, fit_probe, holdout
from eval.measuring import Bench, Judge, MeasureConfig, Outcome, open_bench, records_of
from eval.protocols import ACC1, PER_CLASS
from eval.record_table import print_records, write_table
from eval.records import DENSE, PROBE, Record, text_sha256
from eval.zero_shot import judge
from patchrank.data import CATALOG, Dataset, few_shot, load_dataset
from patchrank.errors import UserError
from patchrank.search.runner import spread

FITS = ("dense", "own")
METRICS = (ACC1, PER_CLASS)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(MeasureConfig):
    """Accuracy of a logistic regression on frozen features, dense and pruned, one JSON each."""

    data: str = "digits"
    """Data set with classes and a train split: a row of the catalog."""
    split: str = "test"
    """Split to judge on."""
    fit: str = "dense"
    """"dense": fitted on dense features, applied unchanged to pruned ones; "own": fitted on each method's own."""
    fit_limit: int | None = 1000
    """Pictures to fit on, validation included, spread over the classes. None: all."""
    shots: int | None = None
    """Pictures of each class to fit on, drawn as CoOp draws them, instead of --fit-limit."""
    Cs: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """Candidates for the inverse of the regularisation; the best on validation is taken."""
    val_share: float = 0.2
    """Share of train held out for choosing C where the data set has no validation split, or --shots is given."""
    main: str = ACC1
    """Metric of the headline: acc1 or mean_per_class_recall."""
    out: Path = Path("out/probe")
    """Folder of the records."""


def main(config: ProbeConfig) -> None:
    """Measure what `--out` lacks, then print the table."""
    with open_bench(config) as bench:
        records = measure(config, bench, config.data)
    write_table("probe", config, records)
    print_records(records, bench.unreached)
    print(f"{records[0].note}; {len(records)} records in {config.out}")


def check(config: ProbeConfig) -> None:
    """Raises: UserError for values that need no data to be seen wrong."""
    if config.fit not in FITS:
        raise UserError(f"--fit {config.fit}: unknown; choose dense or own")
    if config.split == "train":
        raise UserError("--split train: is what the probe is fitted on; judge on test or val")
    if config.main not in METRICS:
        raise UserError(f"--main {config.main}: unknown; choose one of {', '.join(METRICS)}")
    if not config.Cs or min(config.Cs) <= 0:
        raise UserError(f"--Cs {' '.join(map(str, config.Cs))}: needs values above 0, as 0.01 0.1 1")
    if not 0.0 < config.val_share < 1.0:
        raise UserError(f"--val-share {config.val_share:g}: must lie in (0, 1)")
    for name in ("fit_limit", "shots"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class FitImages:
    """Pictures that a probe is fitted on; `val` None: a share of train is held out."""

    train: Dataset
    val: Dataset | None


def fit_images(config: ProbeConfig, data: str) -> FitImages:
    """Train and validation pictures of a data set, as --fit-limit or --shots says.

    Raises: UserError for a data set without classes or without a train split.
    """
    train = _split(config, data, "train")
    if train is None:
        raise UserError(f"--data {data}: has no train split to fit on; choose a data set with one")
    if any(item.label is None for item in train.images):
        raise UserError(f"--data {data}: has no class labels to fit; choose a data set with classes")
    if config.shots is not None:
        return FitImages(train=few_shot(train, config.shots, config.seed), val=None)
    # Where "test" is the val split (its labels are not public), val is for judging, not for choosing C.
    own_val = CATALOG[data].splits.get("val") != CATALOG[data].splits.get(config.split)
    val = _split(config, data, "val") if own_val else None
    limit = config.fit_limit
    if limit is None:
        return FitImages(train=train, val=val)
    if val is not None:
        val = _first(val, max(1, round(config.val_share * limit)))
        limit = max(2, limit - len(val.images))
    return FitImages(train=_first(train, limit), val=val)


def _split(config: ProbeConfig, data: str, split: str) -> Dataset | None:
    """One split; None where the data set does not have it."""
    if split not in CATALOG[data].splits:
        return None
    try:
        return load_dataset(data, root=config.data_root, split=split)
    except UserError as error:
        if str(error).startswith(f"split {split!r}:"):
            return None
        raise


def _first(dataset: Dataset, limit: int) -> Dataset:
    return replace(dataset, images=spread(dataset.images, limit))


def probe_for(config: ProbeConfig, bench: Bench, method: Method, images: FitImages) -> Probe:
    """The probe fitted on one method's features."""
    train_ID, train_label_I = _labelled(bench, images.train, method)
    if images.val is None:
        held_I = holdout(train_label_I, config.val_share, config.seed)
        train, val = (train_ID[~held_I], train_label_I[~held_I]), (train_ID[held_I], train_label_I[held_I])
    else:
        train, val = (train_ID, train_label_I), _labelled(bench, images.val, method)
    num_classes = len(images.train.class_names)
    request = {"features": fingerprint(*train, *val), "Cs": sorted(config.Cs), "num_classes": num_classes}
    return cached_probe(config.cache, request, partial(fit_probe, train, val, config.Cs, num_classes))


def note_of(probe: Probe) -> str:
    """Which C was chosen, how well it did on validation, and whether the list should have gone on."""
    note = f"C = {probe.C:g}, chosen on validation (top-1 {probe.val_acc1[probe.C]:.4f})"
    at_end = len(probe.val_acc1) > 1 and probe.C in (min(probe.val_acc1), max(probe.val_acc1))
    return f"{note}; the list ends there, more --Cs may do better" if at_end else note


def _labelled(bench: Bench, dataset: Dataset, method: Method) -> tuple[Tensor, Tensor]:
    (found,) = bench.features(dataset, dataset.images, [method])
    return found.feature_ID, torch.tensor([item.label for item in found.items])


def measure(config: ProbeConfig, bench: Bench, data: str) -> list[Record]:
    """Records of all methods on one data set; those that `--out` holds are read, not measured.

    Raises: UserError for a data set without classes or a train split.
    """
    check(config)
    if data not in CATALOG:
        raise UserError(f"--data {data}: unknown; choose one of {', '.join(CATALOG)}")
    images = fit_images(config, data)
    dataset = load_dataset(data, root=config.data_root, split=config.split)
    settings = {
        "fit": config.fit,
        "fit_images_sha256": text_sha256(
            item.id for part in (images.train, images.val) if part is not None for item in part.images
        ),
        "num_fit_images": sum(len(part.images) for part in (images.train, images.val) if part is not None),
        "Cs": sorted(config.Cs),
        "val_share": config.val_share if images.val is None else None,
        "shots": config.shots,
    }

    def start(dense: Features) -> Judge:
        dense_probe = probe_for(config, bench, bench.methods[0], images)

        def judge_one(method: Method, found: Features) -> Outcome:
            own = config.fit == "own" and method.name != DENSE
            fitted = probe_for(config, bench, method, images) if own else dense_probe
            return replace(judge(found, dense, fitted, config.main, dense_probe), note=note_of(fitted))

        return judge_one

    said = dict(task=PROBE, protocol=f"probe-{config.fit}", settings=settings)
    return records_of(config.out, bench, dataset, bench.choose(dataset), start, **said)
