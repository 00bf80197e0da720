"""`python -m eval <command>`: one row in `COMMANDS` per command."""

import sys

from eval import (
    claims,
    claims_match,
    compare,
    composition,
    curve,
    kernels,
    pretrain_cost,
    pretrain_study,
    probe,
    report,
    reported_tables,
    retrieval,
    robustness,
    search_cost,
    search_truth,
    suite,
    suite_config,
    throughput,
    trained,
    zero_shot,
)
from patchrank import cli

COMMANDS = {
    "zero-shot": (zero_shot.ZeroShotConfig, zero_shot.main),
    "retrieval": (retrieval.RetrievalConfig, retrieval.main),
    "probe": (probe.ProbeConfig, probe.main),
    "robustness": (robustness.RobustnessConfig, robustness.main),
    "composition": (composition.CompositionConfig, composition.main),
    "suite": (suite_config.SuiteConfig, suite.main),
    "report": (report.ReportConfig, report.main),
    "throughput": (throughput.ThroughputConfig, throughput.main),
    "trained": (trained.TrainedConfig, trained.main),
    "reported": (reported_tables.ReportedConfig, reported_tables.main),
    "claims": (claims.ClaimsConfig, claims.main),
    "curve": (curve.CurveConfig, curve.main),
    "compare": (compare.CompareConfig, compare.main),
    "golden-match": (claims_match.GoldenMatchConfig, claims_match.main),
    "kernels": (kernels.KernelsConfig, kernels.main),
    "pretrain-cost": (pretrain_cost.PretrainCostConfig, pretrain_cost.main),
    "pretrain-study": (pretrain_study.PretrainStudyConfig, pretrain_study.main),
    "search-cost": (search_cost.SearchCostConfig, search_cost.main),
    "search-truth": (search_truth.SearchTruthConfig, search_truth.main),
}
"""Name -> (dataclass of its flags, what it runs)."""


def main(args: list[str]) -> None:
    """Run the command that `args` begins with on the rest of them."""
    name, *rest = args or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        cli.fail(f"{name}: unknown command; choose one of {', '.join(COMMANDS)}")
    config, run = COMMANDS[name]
    cli.run(run, config, prog=f"python -m eval {name}", args=rest)


def usage() -> str:
    """The commands, each with the first line of its dataclass's docstring."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {config.__doc__.splitlines()[0]}" for name, (config, _) in COMMANDS.items()]
    return "\n".join(["usage: python -m eval <command> [flags]; flags: python -m eval <command> --help", *lines])


if __name__ == "__main__":
    main(sys.argv[1:])
