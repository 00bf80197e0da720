"""How zero-shot classification is done, by name: which split, which class names, which prompts, which metric.

The same model scores 82.5 or 93.3 % on Caltech101 depending on these, so every record carries the protocol and hashes.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from patchrank.data import Dataset, load_dataset
from patchrank.errors import UserError

HEAD = "head"
"""What records say where a classifier's own head answers: class names and prompts play no part."""
ACC1, PER_CLASS = "acc1", "mean_per_class_recall"

PER_CLASS_SETS = ("caltech101", "pets", "flowers102", "aircraft")
"""Where the CLIP paper reports the mean over classes. Source: Radford et al. 2021, table 9 ("mean per class")."""

VTAB_NAMES = {
    "caltech101": ("caltech101", "caltech101_vtab"),
    "pets": ("pets", "pets"),
    "flowers102": ("flowers", "flowers"),
    "dtd": ("dtd", None),
    "food101": ("food101", None),
    "aircraft": ("fgvc_aircraft", None),
    "imagenet": ("imagenet1k", "imagenet1k"),
    "imagenet-v2": ("imagenet1k", "imagenet1k"),
    "imagenet-sketch": ("imagenet1k", "imagenet1k"),
    "imagenet-a": ("imagenet1k", None),
    "imagenet-o": ("imagenet1k", None),
    "imagenet-r": ("imagenet1k", None),
}
"""Our row -> CLIP_benchmark's names of its prompts and of its class names (None: as the data set says)."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One row of PROTOCOLS."""

    text: str
    prompts: Callable[[Dataset], Dataset]
    """The data set with this protocol's class names and templates."""
    official: bool
    """Official splits, even where CoOp's split file is there."""
    main_metric: Callable[[str], str]
    """Row of the catalog -> the metric of the headline."""


def _vtab(dataset: Dataset) -> Dataset:
    """CLIP_benchmark's class names and prompts, read from the installed package.

    Raises: UserError where it is not installed or does not have the data set.
    """
    if dataset.name not in VTAB_NAMES:
        raise UserError(f"--protocol vtab: CLIP_benchmark has no {dataset.name}; choose coop or openai")
    prompts, names = VTAB_NAMES[dataset.name]
    templates = _clip_benchmark("en_zeroshot_classification_templates.json")[prompts]
    class_names = dataset.class_names if names is None else _clip_benchmark("en_classnames.json")[names]
    if len(class_names) != len(dataset.class_names):
        raise UserError(
            f"--protocol vtab: CLIP_benchmark names {len(class_names)} classes of {dataset.name}, the files here have "
            f"{len(dataset.class_names)}; use the complete official archive"
        )
    return replace(dataset, class_names=class_names, templates=tuple(one.replace("{c}", "{}") for one in templates))


def _clip_benchmark(file: str) -> dict:
    """One of CLIP_benchmark's tables; the package is found, not imported (that takes seconds)."""
    spec = importlib.util.find_spec("clip_benchmark")
    if spec is None or spec.origin is None:
        raise UserError(
            "--protocol vtab: takes class names and prompts from CLIP_benchmark; pip install 'patchrank[bench]'"
        )
    return json.loads((Path(spec.origin).parent / "datasets" / file).read_text(encoding="utf-8"))


PROTOCOLS: dict[str, Protocol] = {
    "coop": Protocol(
        text="CoOp's split and its one prompt; top-1",
        prompts=lambda dataset: dataset,
        official=False,
        main_metric=lambda name: ACC1,
    ),
    "openai": Protocol(
        text="OpenAI's prompt ensemble on the same split; mean per class where the CLIP paper uses it",
        prompts=Dataset.with_ensemble,
        official=False,
        main_metric=lambda name: PER_CLASS if name in PER_CLASS_SETS else ACC1,
    ),
    "vtab": Protocol(
        text="official splits with CLIP_benchmark's class names and prompts; top-1",
        prompts=_vtab,
        official=True,
        main_metric=lambda name: ACC1,
    ),
}
"""Name -> protocol."""


def check_protocol(name: str) -> None:
    """Raises: UserError for an unknown name."""
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name}: unknown; choose one of {', '.join(PROTOCOLS)}")


def load_for(name: str, data: str, root: Path | None, split: str) -> Dataset:
    """One split of a data set as the protocol `name` wants it."""
    check_protocol(name)
    protocol = PROTOCOLS[name]
    return protocol.prompts(load_dataset(data, root=root, split=split, official=protocol.official))
