"""Accuracy of every method on one data set of a suite, by the command whose protocol fits the model."""

from dataclasses import fields

from eval import probe, retrieval, zero_shot
from eval.measuring import Bench, MeasureConfig
from eval.protocols import PROTOCOLS
from eval.records import Record
from eval.suite_config import SuiteConfig
from eval.suite_sets import Present
from patchrank.errors import UserError

AUTO, PROBE = "auto", "probe"


def check_protocol(name: str) -> None:
    """Raises: UserError for a protocol that a suite does not know."""
    if name not in (AUTO, PROBE, *PROTOCOLS):
        raise UserError(f"--protocol {name}: unknown; choose from {', '.join((AUTO, PROBE, *PROTOCOLS))}")


def protocol_for(asked: str, num_head: int | None, has_text: bool, num_classes: int) -> str:
    """`probe`, or the protocol of zero-shot classification.

    Args: num_head, classes of the model's own head, None without one. `auto` takes the head where it has as many
    classes as the data set, the text tower where there is one, and else the probe.
    """
    if asked != AUTO:
        return asked
    return "coop" if num_head == num_classes or (num_head is None and has_text) else PROBE


def measure_set(config: SuiteConfig, bench: Bench, present: Present) -> list[Record]:
    """Records of all methods of the bench, dense first; those that `--out` holds are read, not measured.

    A data set without classes is judged by retrieval, by the captions of its images.
    """
    clip, dataset = bench.clip, present.dataset
    shared = {one.name: getattr(bench.config, one.name) for one in fields(MeasureConfig)}
    if not dataset.class_names:
        told = retrieval.RetrievalConfig(**shared, data=dataset.name, out=config.out)
        return retrieval.measure(told, bench, dataset.name)
    num_head = None if clip.class_head is None else len(clip.class_head[0])
    protocol = protocol_for(config.protocol, num_head, clip.text is not None, len(dataset.class_names))
    if protocol == PROBE:
        fit = probe.ProbeConfig(**shared, data=dataset.name, fit_limit=config.fit_limit, out=config.out)
        return probe.measure(fit, bench, dataset.name)
    said = zero_shot.ZeroShotConfig(**shared, data=dataset.name, protocol=protocol, out=config.out)
    return zero_shot.measure(said, bench, dataset.name)
