"""The result files that claims are judged by, and the commands that make them; nothing is run."""

import json
from collections import Counter
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

from eval.claims_rules import NotMeasured
from eval.records import CLASSIFICATION, DENSE, PROBE, Record, read_records, read_sides
from eval.report_data import panels_of
from eval.report_rows import Measured, Panel
from patchrank.errors import UserError

_MODEL = (
    "--model vit_tiny_patch16_224 --pretrained $PATCHRANK_ASSETS/weights/vit_tiny_patch16_224_tiny-imagenet.safetensors"
)
REAL = f"{_MODEL} --data tiny-imagenet --split val"
"""Flags of the real tower and its data, as in docs/results/README.md."""
_PICTURES = "--data flickr8k+caltech101+food101"
COMMANDS = {
    "search_cost.json": f"python -m eval search-cost {REAL} --limit 64 --layer 3 --threads 1",
    "search_truth.json": f"python -m eval search-truth {REAL} --limit 1000",
    "golden_match.json": f"python -m eval golden-match {_MODEL} --store docs/results/stores/exact_drop --partial "
    "--trained <folder of predictors.train --rest drop --loss listwise:1 --store <golden rankings of train images>> "
    "--threads 1 --out docs/results",
    "export_bench.json": "python -m export.bench --threads 2 --model ViT-B-16 --batch 16",
    "prompt.json": "python -m predictors.prompt --model ViT-B-16 --pretrained openai --data caltech101 "
    "--cuts 3:176,5:156,7:136,9:116 --rest drop",
    "pretrain_cost.json": "python -m eval pretrain-cost --threads 2",
    "pretrain_study.json": f"python -m eval pretrain-study {_PICTURES} --jobs 2",
    "eval": f"python -m eval suite {_MODEL} --datasets tiny-imagenet caltech101 food101 --threads 1 --no-photos "
    "--files calibrated=<folder> trained=<folder> trained-drop=<folder> tokens=<folder>",
}
"""Result file (or folder of records) -> the command that makes it."""


class Files:
    """A folder of results; files are read when a claim asks for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._read: dict[str, dict] = {}
        self._panels: dict[float, list[Panel]] = {}

    def json(self, name: str) -> dict:
        """One result file. Raises: NotMeasured where it is absent; UserError where it is no JSON object with rows."""
        path = self.folder / name
        if name not in self._read:
            if not path.is_file():
                raise NotMeasured(COMMANDS[name])
            try:
                found = json.loads(path.read_bytes())
                self._read[name] = {"rows": found["rows"], **found}
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}: no JSON object with rows ({error}); delete it and measure again") from None
        return self._read[name]

    def row(self, name: str, /, **wanted: object) -> dict:
        """The first row of a file whose fields are these. Raises: NotMeasured."""
        found = [row for row in self.json(name)["rows"] if all(row.get(key) == value for key, value in wanted.items())]
        if not found:
            raise NotMeasured(COMMANDS[name])
        return found[0]

    @cached_property
    def records(self) -> list[Record]:
        """Accuracy records of eval/, of the image tower that has most of them."""
        folder = self.folder / "eval"
        found = read_records(folder) if folder.is_dir() else []
        found = [one for one in found if one.task in (CLASSIFICATION, PROBE) and one.keep is None and one.side]
        counts = Counter(one.weights_hash for one in found)
        return [one for one in found if one.weights_hash == counts.most_common(1)[0][0]]

    def panels(self, macs: float) -> list[Panel]:
        """All rows of a budget and the unpruned tower, by data set."""
        if macs not in self._panels:
            own = [one for one in self.records if one.method == DENSE or one.macs == macs]
            self._panels[macs] = panels_of(Measured(one, read_sides(self.folder / "eval", one)) for one in own)
        return self._panels[macs]

    def pairs(self, first: str, second: str, macs: float, without: Collection[str] = ()) -> dict[str, tuple]:
        """Data set -> both methods' records at one budget (`DENSE`: the unpruned tower); sets that lack one are out."""
        panels = [panel for panel in self.panels(macs) if panel.dataset not in without]
        found = {panel.dataset: (_row(panel, first, macs), _row(panel, second, macs)) for panel in panels}
        found = {name: pair for name, pair in found.items() if None not in pair}
        if not found:
            raise NotMeasured(COMMANDS["eval"])
        return found


def _row(panel: Panel, method: str, macs: float) -> Measured | None:
    return panel.dense if method == DENSE else panel.rows.get((method, macs))
