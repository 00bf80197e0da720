"""A claim, and the row that it becomes: reported number, ours, interval, verdict by its rule, why."""

from collections.abc import Callable
from dataclasses import dataclass

from eval.claims_files import Files
from eval.claims_rules import NOT_TESTABLE, Found, NotMeasured, Rule


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of a paper, and how our result files answer it."""

    paper: str
    claim: str
    reported: float | None
    """The paper's number, in `unit`; None where it prints none."""
    where: str
    """Where the paper says so, with its numbers."""
    unit: str
    """A key of `eval.claims_print.UNITS`."""
    measure: Callable[[Files], Found]
    """Raises: NotMeasured with the command where the files lack it."""
    rule: Rule
    paper_setting: str
    """Model and data of the paper."""


def row_of(claim: Claim, files: Files) -> dict:
    """The row of claims.json: values in the claim's unit, None where nothing is measured."""
    said = {"paper": claim.paper, "claim": claim.claim, "reported": claim.reported}
    rest = {"unit": claim.unit, "where": claim.where, "rule": claim.rule.text}
    try:
        found = claim.measure(files)
    except NotMeasured as absent:
        why = f"not measured: {absent}"
        return said | {
            "ours": None, "interval": None, "verdict": NOT_TESTABLE, "why": why, "command": str(absent),
            "interval_of": None,
        } | rest  # fmt: skip
    verdict = claim.rule.judge(found, claim.reported)
    doubt = f"{claim.rule.doubt(found, claim.reported)}; " if verdict == NOT_TESTABLE else ""
    return said | {
        "ours": found.value,
        "interval": None if found.low is None else [found.low, found.high],
        "verdict": verdict,
        "why": f"{doubt}ours: {found.setting}; paper: {claim.paper_setting}",
        "command": found.command,
        "interval_of": found.spread,
    } | rest  # fmt: skip
