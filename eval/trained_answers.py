"""Answers where a model has none of its own for the data, from a probe on unpruned features; journals pooled."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval.journal import Journal
from eval.measuring import open_bench
from eval.probe import ProbeConfig, fit_images, note_of, probe_for
from patchrank.data import CATALOG
from patchrank.errors import UserError
from patchrank.search.plan import Plan
from patchrank.search.store import read_json

_JOURNAL, _REQUEST = "trained.jsonl", "search.json"


def with_answers(plan: Plan, fit: ProbeConfig) -> tuple[Plan, dict]:
    """The plan with a logistic regression on unpruned train features for its answers, and what was fitted.

    The plan as it is, and {}, where the model has answers of its own, where the data set has no classes or no train
    split, or where nothing is to be fitted (`fit_limit` 0). Raises: UserError as `fit_images` and `fit_probe`.
    """
    dataset = plan.dataset
    if plan.job.logits is not None or fit.fit_limit == 0 or not dataset.class_names:
        return plan, {}
    row = CATALOG.get(dataset.name)
    if dataset.split == "all" or row is None or "train" not in row.splits:
        return plan, {}
    if dataset.split == "train":
        raise UserError("--split train: is what a probe would be fitted on; judge on test or val, or --fit-limit 0")
    with open_bench(fit, plan.clip) as bench:
        images = fit_images(fit, dataset.name)
        probe = probe_for(fit, bench, bench.methods[0], images)
    job = replace(plan.job, logits=lambda feature_BD: probe(feature_BD.cpu()).to(feature_BD.device))
    num_images = sum(len(part.images) for part in (images.train, images.val) if part is not None)
    return replace(plan, job=job), {"num_fit_images": num_images, "C": probe.C, "note": note_of(probe)}


def open_journal(folder: Path) -> Journal:
    """What `python -m eval trained` has measured into a folder."""
    return Journal(folder / _JOURNAL, ("batch", "method", "macs"))


def pooled_journals(folders: Sequence[Path], own: dict) -> dict[str, Journal]:
    """Data set -> journal, of `--out` folders of earlier runs with the same weights.

    Args: own: the request of this run. Raises: UserError for a folder that holds no run, one of other weights or of
    this run's images, or a data set twice.
    """
    found: dict[str, Journal] = {}
    for folder in folders:
        if not (folder / _REQUEST).is_file() or not (folder / _JOURNAL).is_file():
            raise UserError(f"--pool {folder}: holds no run; give an --out of python -m eval trained")
        request = read_json(folder / _REQUEST)
        if request["weights_hash"] != own["weights_hash"]:
            raise UserError(f"--pool {folder}: was measured with other weights; measure it with this model")
        if request["images"] == own["images"]:
            raise UserError(f"--pool {folder}: holds the images of this run; leave it out, they count already")
        if request["data"] in found:
            raise UserError(f"--pool {folder}: {request['data']} is there already; give each data set once")
        found[request["data"]] = open_journal(folder)
    return found
