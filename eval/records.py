"""One JSON per measurement (model, method, budget, data set, task), with what every image said in an .npz beside it.

The first keys are CLIP_benchmark's (dataset, model, pretrained, task, metrics, language), so that its `build` reads
the files too; metrics are fractions in [0, 1] under its names: `acc1`, `acc5`, `mean_per_class_recall`,
`image_retrieval_recall@5`, ... Tables and reports are made from these files alone.

Letters: I samples of one measurement (images, captions or questions).
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from patchrank.atomic import write_bytes, write_json
from patchrank.errors import UserError

SCHEMA = 1
DENSE = "dense"
"""Name of the unpruned tower among the methods."""
CLASSIFICATION = "zeroshot_classification"
RETRIEVAL = "zeroshot_retrieval"
PROBE = "linear_probe"
COMPOSITION = "image_caption_selection"
TASKS = (CLASSIFICATION, RETRIEVAL, PROBE, COMPOSITION)
"""CLIP_benchmark's names."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was measured: two measurements with equal fields are the same one."""

    dataset: str
    """Row of the catalog."""
    model: str
    pretrained: str
    """Tag, or name of the checkpoint file without its folder."""
    task: str
    """One of TASKS."""
    language: str = "en"
    method: str
    """DENSE or a row of `eval.rivals.RIVALS`."""
    macs: float
    """Budget asked for: share of the dense MACs, whose last block computes the class row only; 1 for DENSE."""
    keep: float | None = None
    """The keep ratio that said the budget; None where it was said in MACs."""
    image_macs: int
    """MACs per image that the method's image tower really spends; 1 MAC = 2 FLOP."""
    dense_macs: int
    protocol: str
    """coop, openai, vtab; `head` where a classifier's own head answers; see `eval.protocols` and `eval.probe`."""
    split: str
    split_source: str
    """File or folder that defines the split."""
    split_sha256: str
    """Over ids, labels and captions of the whole split as read."""
    num_images: int
    images_sha256: str
    """Over the ids of the images to judge, in their order."""
    classnames_sha256: str | None = None
    templates_sha256: str | None = None
    weights_hash: str
    """Of the image tower."""
    seeds: dict[str, int] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    """What else the task was told, e.g. the data that a probe was fitted on."""

    @property
    def macs_share(self) -> float:
        """What the method really spends, as a share of the dense MACs."""
        return self.image_macs / self.dense_macs

    @property
    def stem(self) -> str:
        """File name without suffix: data set, split, count, model, task, protocol, method and budget."""
        budget = f"macs{self.macs:.4g}" if self.keep is None else f"keep{self.keep:.4g}"
        pretrained = self.pretrained.removesuffix(".safetensors")
        model = self.model if pretrained in ("", self.model) else f"{self.model} {pretrained}"
        parts = [self.dataset, self.split, self.num_images, model, self.task, self.protocol]
        parts += [self.method] if self.method == DENSE else [self.method, budget]
        return "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", str(part)) for part in parts)


@dataclass(frozen=True, kw_only=True)
class Record(Subject):
    """A subject and what came out."""

    metrics: dict[str, float]
    """Fractions in [0, 1]. Beside CLIP_benchmark's: `cosine`, mean cosine to the unpruned feature; `agreement`, share
    of the unpruned tower's answers."""
    main_metric: str
    """The metric that a headline shows; a key of `metrics`."""
    missing: int = 0
    """Pictures that the split lists and the disk lacks."""
    broken: list[str] = field(default_factory=list)
    """Ids of pictures that could not be decoded; they are not judged."""
    note: str = ""
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    host: dict[str, str | int] = field(default_factory=dict)
    """Processor, threads, device; no host name."""
    side: str | None = None
    """Name of the .npz beside the JSON."""
    side_sha256: str | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.main_metric not in self.metrics:
            raise ValueError(f"main_metric {self.main_metric!r}: must be one of {', '.join(self.metrics)}")

    @property
    def main(self) -> float:
        """Value of the main metric."""
        return self.metrics[self.main_metric]

    @property
    def subject(self) -> Subject:
        """What was measured, without the results."""
        return Subject(**{one.name: getattr(self, one.name) for one in fields(Subject)})


def text_sha256(values: Iterable[object]) -> str:
    """Hex SHA-256 of JSON-able values in their order."""
    return hashlib.sha256(json.dumps(list(values), ensure_ascii=False).encode()).hexdigest()


def path_of(folder: Path, subject: Subject) -> Path:
    """Where the record of a subject lies in a folder."""
    return Path(folder) / f"{subject.stem}.json"


def write_record(folder: Path, record: Record, sides: dict[str, np.ndarray] | None = None) -> Record:
    """Write the .npz first, then the JSON that names it by hash; both atomic. Returns: the record as written.

    Args: sides, arrays (I, ...): `ids` (str) and what the task says of each, such as `correct` (bool), `cosine`.
    """
    path, values = path_of(folder, record), asdict(record)
    if sides:
        file = io.BytesIO()
        np.savez_compressed(file, **sides)
        write_bytes(path.with_suffix(".npz"), file.getvalue())
        values["side"] = path.with_suffix(".npz").name
        values["side_sha256"] = hashlib.sha256(file.getvalue()).hexdigest()
    write_json(path, values)
    return Record(**values)


def read_record(path: Path) -> Record:
    """One record. Raises: UserError for a file that is no record of this schema."""
    try:
        values = json.loads(Path(path).read_bytes())
        extra = sorted(set(values) - {one.name for one in fields(Record)})
        if values["schema"] != SCHEMA or extra:
            raise ValueError(f"schema {values['schema']}, unknown keys {extra}")
        return Record(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a record of schema {SCHEMA} ({error}); delete it and measure again") from None


def is_record(path: Path) -> bool:
    """Whether a JSON file has the keys of a record (other results may lie in the same folder)."""
    try:
        values = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"schema", "task", "method", "metrics", "dataset"} <= set(values)


def read_records(folder: Path) -> list[Record]:
    """All records of a folder, in the order of their file names; other JSON files are passed over."""
    return [read_record(path) for path in sorted(Path(folder).glob("*.json")) if is_record(path)]


def read_sides(folder: Path, record: Record) -> dict[str, np.ndarray]:
    """The arrays of a record; {} where it has none.

    Raises: UserError for a file that is absent or not the one that the record names.
    """
    if record.side is None:
        return {}
    path = Path(folder) / record.side
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != record.side_sha256:
        raise UserError(f"{path}: absent, or changed since its JSON was written; delete the JSON and measure again")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _as_json(subject: Subject) -> str:
    return json.dumps(asdict(subject), sort_keys=True)


def find_record(folder: Path, subject: Subject) -> Record | None:
    """The whole record of a subject in a folder; None where there is none, or one of something else by that name."""
    path = path_of(folder, subject)
    if not path.is_file():
        return None
    found = read_record(path)
    same = _as_json(found.subject) == _as_json(subject)
    return found if same and (found.side is None or (path.parent / found.side).is_file()) else None
