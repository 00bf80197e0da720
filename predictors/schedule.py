"""`python -m predictors.schedule`: cuts and counts for a budget in MACs or milliseconds, found on this machine.

It times every stage of the tower, enumerates small families of schedules, each brought to the budget, and takes the
one that keeps the feature best on a few train images; no labels. Patches are selected as `patchrank.apply` does when it
is told no scorer. The presets stand in the same table. With `--refit` the best of them are calibrated for some steps,
and what is best then is taken.
"""

from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from patchrank import cli
from patchrank.atomic import write_json, write_text
from patchrank.data import load_dataset
from patchrank.errors import UserError
from patchrank.loading import LoadedClip, load_clip
from patchrank.macs import dense_macs
from patchrank.presets import DEFAULT_MACS, Cost, low_latency, spec_for_macs
from patchrank.provenance import command, machine, versions
from patchrank.pruned import Scorer
from patchrank.salient import SALIENT, Salient, default_scorer
from patchrank.scorers import SCORERS
from patchrank.search.plan import threads
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig
from predictors import schedule_search as families
from predictors.cache import Tokens, encode, part, split_items
from predictors.schedule_config import ScheduleConfig, check
from predictors.schedule_costs import MacCosts, StageCosts, total
from predictors.schedule_refit import calibration, finalists, refitted_cosines
from predictors.schedule_report import advice, as_csv, make_rows, markdown
from predictors.schedule_times import TimeCosts, measure

SEARCHED = "searched"


def main(config: ScheduleConfig) -> None:
    """Search as `config` says; write the files and print the table."""
    check(config)
    with threads(config.threads):
        report = find(config, load_clip(config.model, config.pretrained, config.device), quiet=False)
    print(report["table"])
    print(f"schedule.json, .csv and .md in {config.out}")


def find(config: ScheduleConfig, clip: LoadedClip, *, quiet: bool = True) -> dict:
    """Measure, search, write the files into --out, and return the report.

    Raises: UserError for a budget that the dense tower meets already or that no schedule can meet.
    """
    tower, tower_config = clip.tower, clip.tower.config
    manner, scorer = selection(tower_config, config.rest)
    times = measure(tower, manner, scorer, batch_size=config.batch_size, rounds=config.rounds, quiet=quiet)
    costs: StageCosts = MacCosts(tower_config, manner) if config.ms is None else times
    cost = lambda config_of, spec: total(costs, config_of, spec)  # noqa: E731
    share = _share(config, times, tower_config)
    deciding, held_out = _images(config, clip, quiet)
    judges = families.cosine_judge(tower, deciding, scorer), families.cosine_judge(tower, held_out, scorer)
    values = _search(config, tower_config, manner, share, costs, cost, judges[0], quiet)
    specs = _presets(tower_config, share, manner, cost) | {name: values[name][1] for name in _family_bests(values)}
    refitted: dict[str, float] = {}
    if config.refit:
        specs, refitted = _refit(config, clip, specs, finalists(values, config.finalists), scorer, quiet)
    else:
        specs[SEARCHED] = values[SEARCHED][1]
    rows = make_rows(tower, specs, scorer, times, judges, config.rounds, refitted)
    table = markdown(rows, config.batch_size)
    report = {
        "command": command("predictors.schedule"),
        "versions": versions(),
        "machine": machine(),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()},
        "weights_hash": clip.weights_hash,
        "dense_image_macs": dense_macs(tower_config),
        "share": share,
        "times": times.to_dict(),
        "rows": [asdict(row) for row in rows],
        "spec": specs[SEARCHED].to_dict(),
        "advice": advice(rows),
    }
    write_json(config.out / "schedule.json", report)
    write_text(config.out / "schedule.csv", as_csv(rows))
    write_text(config.out / "schedule.md", f"`{report['command']}`\n\n{table}\n\n{report['advice']}\n")
    return report | {"table": f"{table}\n\n{report['advice']}"}


def selection(tower_config: TowerConfig, rest: str) -> tuple[PruneSpec, Scorer]:
    """How `patchrank.apply` selects patches of this tower when it is told no scorer: a spec without cuts, a scorer."""
    if default_scorer(tower_config) == SALIENT:
        return PruneSpec(cuts=(), rest=rest, select="cover"), Salient()
    return PruneSpec(cuts=(), rest=rest, select="suppress"), SCORERS["random"](tower_config.grid)


def _share(config: ScheduleConfig, times: TimeCosts, tower_config: TowerConfig) -> float:
    """The budget as a share of the dense tower's cost. Raises: UserError if the dense tower is fast enough."""
    if config.ms is None:
        return DEFAULT_MACS if config.macs is None else config.macs
    dense = total(times, tower_config, PruneSpec(cuts=())) / config.batch_size
    if config.ms >= dense:
        raise UserError(f"--ms {config.ms:g}: the dense tower takes {dense:.3g} ms an image here; nothing to prune")
    return config.ms / dense


def _images(config: ScheduleConfig, clip: LoadedClip, quiet: bool) -> tuple[Tokens, Tokens]:
    """Tokens that enter block 0 of the images that decide, and of others."""
    dataset = load_dataset(config.data, root=config.data_root, split=config.split)
    deciding, held_out = split_items(dataset.images, config.num_images, config.held_out)
    first, second = (
        encode(clip.tower, part(dataset, items), clip.preprocess, 0, quiet=quiet) for items in (deciding, held_out)
    )
    return first, second


def _search(
    config: ScheduleConfig,
    tower_config: TowerConfig,
    manner: PruneSpec,
    share: float,
    costs: StageCosts,
    cost: Cost,
    judge: families.Judge,
    quiet: bool,
) -> dict[str, tuple[float, PruneSpec]]:
    """{name: (cosine, spec)} of all schedules tried, and SEARCHED, the best of all after the moves.

    Raises: UserError if none fits the budget.
    """
    candidates = families.one_cuts(tower_config, share, manner, cost) | families.spans(
        tower_config, share, manner, cost
    )
    if not candidates:
        raise UserError(f"the budget, {share:.2f} of the dense cost, is below what any schedule reaches; raise it")
    num = len(candidates) + tower_config.num_layers * len(families.TABLE_KEEPS)
    with tqdm(total=num + config.num_moves, unit=" schedules", desc="search", disable=quiet) as bar:

        def counted(spec: PruneSpec) -> float:
            bar.update()
            return judge(spec)

        table = families.damage_table(tower_config, manner, counted)
        candidates |= families.programmes(tower_config, share, manner, table, costs, cost)
        values = {name: (counted(spec), spec) for name, spec in candidates.items()}
        value, winner = max(values.values(), key=lambda found: found[0])
        if winner.where == "inside":
            winner = families.improve(
                winner, share, tower_config, cost, counted, num_moves=config.num_moves, seed=config.seed
            )
            value = judge(winner)
    return values | {SEARCHED: (value, winner)}


def _family_bests(values: dict[str, tuple[float, PruneSpec]]) -> list[str]:
    """Name of the best schedule of each family."""
    best = (
        max((name for name in values if name.startswith(family)), key=lambda name: values[name][0], default=None)
        for family in families.FAMILIES
    )
    return [name for name in best if name is not None]


def _refit(
    config: ScheduleConfig,
    clip: LoadedClip,
    specs: dict[str, PruneSpec],
    chosen: dict[str, PruneSpec],
    scorer: Scorer,
    quiet: bool,
) -> tuple[dict[str, PruneSpec], dict[str, float]]:
    """All specs, SEARCHED the best after calibration on the images that decide; cosines on the others by name."""
    common = {name: getattr(config, name) for name in
              ("data", "data_root", "split", "batch_size", "seed", "device", "threads")}  # fmt: skip
    told = calibration(
        config.out / "refit", common, config.refit_images, config.held_out + config.num_images, config.refit
    )
    chosen = {("moved" if name == SEARCHED else name): spec for name, spec in chosen.items()}
    cosine_n = refitted_cosines(clip, chosen, scorer, told, quiet=quiet)
    # `split_items` holds the same images out, first those of the table's cosines, then those that decide.
    best = max(cosine_n, key=lambda name: cosine_n[name][config.held_out :].mean().item())
    found = {name: value_n[: config.held_out].mean().item() for name, value_n in cosine_n.items()}
    return specs | chosen | {SEARCHED: chosen[best]}, found | {SEARCHED: found[best]}


def _presets(tower_config: TowerConfig, share: float, manner: PruneSpec, cost: Cost) -> dict[str, PruneSpec]:
    """Both presets at the same budget, where they reach it."""

    def with_manner(config: TowerConfig, spec: PruneSpec) -> float:
        return cost(config, replace(spec, select=manner.select))

    found = {}
    for name, preset in (("preset low-latency", low_latency), ("preset accurate", spec_for_macs)):
        try:
            spec = preset(tower_config, share, rest=manner.rest, cost=with_manner)
            found[name] = replace(spec, select=manner.select)
        except UserError:
            continue
    return found


if __name__ == "__main__":
    cli.run(main, ScheduleConfig, prog="python -m predictors.schedule")
