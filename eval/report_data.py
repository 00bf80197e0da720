"""What a report stands on: the records of one image tower, its throughput, pictures and the state of its data sets.

Reads files only; nothing is computed by a model.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.records import CLASSIFICATION, DENSE, PROBE, RETRIEVAL, Record, read_records, read_sides
from eval.report_rows import Measured, Panel
from patchrank.errors import UserError

SUITE, THROUGHPUT, PICTURES = "suite", "throughput", "pictures"
"""`kind` of the JSON files beside the records."""
_JUDGED = (CLASSIFICATION, PROBE)
MEASURED = "measured"
"""State of a data set whose images were there."""
TORCH = "torch"
"""The runtime whose speed stands in the tables."""
TITLES = {
    "caltech101": "Caltech101",
    "pets": "OxfordPets",
    "flowers102": "Flowers102",
    "food101": "Food101",
    "aircraft": "FGVCAircraft",
    "dtd": "DTD",
    "ucf101": "UCF101",
    "tiny-imagenet": "Tiny-ImageNet",
    "imagenet": "ImageNet",
    "digits": "Digits",
    "flickr8k": "Flickr8k",
    "flickr30k": "Flickr30k",
    "coco": "COCO",
}
SEVEN = tuple(TITLES)[:7]
"""The data sets of the papers, by their rows in the catalog."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """All about one image tower."""

    model: str
    weights_hash: str
    panels: list[Panel]
    retrieval: list[Panel] = field(default_factory=list)
    others: list[Record] = field(default_factory=list)
    """Records of further tasks, or at a keep ratio."""
    suite: dict = field(default_factory=dict)
    speed: list[dict] = field(default_factory=list)
    """Throughput files, one per runtime, batch and number of threads."""
    pictures: dict = field(default_factory=dict)
    memo: dict = field(default_factory=dict, repr=False, compare=False)
    """What was computed from all this already, by name."""

    @property
    def dense_macs(self) -> int:
        return self.panels[0].dense.record.dense_macs

    @property
    def methods(self) -> list[str]:
        """All methods in the order of the suite, then as found."""
        found = dict.fromkeys(method for panel in self.panels for method, _ in [*panel.rows, *panel.shorter])
        named = [one["name"] for one in self.suite.get("methods", []) if one["name"] in found]
        return list(dict.fromkeys([*named, *found]))

    @property
    def budgets(self) -> list[float]:
        """From the largest to the smallest."""
        return sorted({macs for panel in self.panels for macs in panel.budgets}, reverse=True)

    def text_of(self, method: str) -> str:
        """What a method is, in a few words."""
        return next((one["text"] for one in self.suite.get("methods", []) if one["name"] == method), "")


def title_of(dataset: str) -> str:
    """Name of a data set in print."""
    return TITLES.get(dataset, dataset)


def read_kinds(folder: Path) -> dict[str, list[dict]]:
    """{kind: files} of the JSON files of a suite that are no records.

    Raises: UserError for a file that is no JSON.
    """
    found: dict[str, list[dict]] = defaultdict(list)
    for path in sorted(Path(folder).glob("*.json")):
        try:
            value = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: no JSON ({error}); delete it and measure again") from None
        if isinstance(value, dict) and value.get("kind") in (SUITE, THROUGHPUT, PICTURES):
            found[value["kind"]].append(value)
    return found


def read_results(folder: Path) -> list[Results]:
    """Everything in a folder, one entry per image tower that has a panel.

    Raises: UserError for a folder without accuracy of any method beside the dense tower.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--results {folder}: no such folder; run python -m eval suite first, or name its --out")
    records, kinds = read_records(folder), read_kinds(folder)
    towers: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        towers[record.weights_hash].append(record)
    results = [_results(folder, weights_hash, found, kinds) for weights_hash, found in towers.items()]
    results = [one for one in results if one.panels]
    if not results:
        raise UserError(f"--results {folder}: nothing but the dense tower measured; run python -m eval suite first")
    return results


def _results(folder: Path, weights_hash: str, records: list[Record], kinds: dict[str, list[dict]]) -> Results:
    own = {kind: [one for one in files if one.get("weights_hash") == weights_hash] for kind, files in kinds.items()}
    panels, retrieval = (
        panels_of(
            Measured(one, read_sides(folder, one))
            for one in records
            if one.task in tasks and one.keep is None and one.side
        )
        for tasks in (_JUDGED, (RETRIEVAL,))
    )
    both = [*panels, *retrieval]
    shown = {id(row.record) for one in both for row in [one.dense, *one.rows.values(), *one.shorter.values()]}
    return Results(
        model=records[0].model,
        weights_hash=weights_hash,
        panels=panels,
        retrieval=retrieval,
        others=[one for one in records if id(one) not in shown and not _repeats(one, both)],
        suite=(own.get(SUITE) or [{}])[0],
        speed=own.get(THROUGHPUT, []),
        pictures=(own.get(PICTURES) or [{}])[0],
    )


def _repeats(record: Record, panels: Sequence[Panel]) -> bool:
    """Whether a record is the unpruned tower on some of the images of a panel."""
    there = {(one.dataset, one.task, one.protocol) for one in panels}
    return record.method == DENSE and (record.dataset, record.task, record.protocol) in there


def panels_of(measured: Iterable[Measured]) -> list[Panel]:
    """One panel per data set: of several splits, tasks and protocols the one with most rows."""
    groups: dict[tuple, list[Measured]] = defaultdict(list)
    for one in measured:
        groups[_judging(one.record)].append(one)
    best: dict[str, Panel] = {}
    for panel in filter(None, map(_panel, groups.values())):
        if panel.dataset not in best or len(panel.rows) > len(best[panel.dataset].rows):
            best[panel.dataset] = panel
    order = list(TITLES)
    return sorted(
        best.values(), key=lambda one: (order.index(one.dataset) if one.dataset in order else len(order), one.dataset)
    )


def _judging(record: Record) -> tuple[str, ...]:
    """All that must be equal for two rows to be held against each other, but for the list of images."""
    told = (record.seeds, record.settings, record.split_sha256, record.classnames_sha256, record.templates_sha256)
    return record.dataset, record.split, record.task, record.protocol, json.dumps(told, sort_keys=True)


def _panel(found: Sequence[Measured]) -> Panel | None:
    """The rows of one protocol; None without a method beside the dense tower.

    Of several image lists the one with most rows makes the panel (then the longest); rows on fewer of its images are
    kept apart.
    """
    lists: dict[str, list[Measured]] = defaultdict(list)
    for one in found:
        lists[one.record.images_sha256].append(one)
    complete = [rows for rows in lists.values() if len(rows) > 1 and any(x.record.method == DENSE for x in rows)]
    if not complete:
        return None
    chosen = max(complete, key=lambda rows: (len(rows), rows[0].record.num_images))
    base = next(one for one in chosen if one.record.method == DENSE)
    rows = {one.key: one for one in chosen if one.record.method != DENSE}
    ids = set(base.sides["ids"].tolist())
    others = [one for one in found if one.record.method != DENSE and one.key not in rows]
    shorter = {one.key: one for one in others if set(one.sides["ids"].tolist()) < ids}
    record = base.record
    return Panel(
        dataset=record.dataset, task=record.task, protocol=record.protocol, dense=base, rows=rows, shorter=shorter
    )


def runtimes_of(results: Results) -> list[str]:
    """Runtimes that were timed, PyTorch first."""
    return sorted({one["runtime"] for one in results.speed if one["rows"]}, key=lambda name: (name != TORCH, name))


def speed_of(results: Results, runtime: str = TORCH) -> dict | None:
    """The throughput file of a runtime, the largest batch measured; None without any."""
    found = [one for one in results.speed if one["runtime"] == runtime and one["rows"]]
    return max(found, key=lambda one: (one["batch"], len(one["rows"])), default=None)
