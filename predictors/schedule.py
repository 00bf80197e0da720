"""`python -m predictors.schedule`: cuts and counts for a budget in MACs or milliseconds, found on this machine.

It times every stage of the tower, enumerates small families of schedules, each brought to the budget, and takes the
one that keeps the feature best on a few train images; no labels. Patches are selected as `patchrank.apply` does when it
is told no scorer. The presets stand in the same table.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from patchrank import cli
from patchrank.atomic import write_json, write_text
from patchrank.data import CATALOG, load_dataset
from patchrank.errors import UserError
from patchrank.loading import LoadedClip, load_clip
from patchrank.macs import dense_macs
from patchrank.presets import DEFAULT_MACS, Cost, check_macs, low_latency, spec_for_macs
from patchrank.provenance import command, machine, versions
from patchrank.pruned import Scorer
from patchrank.salient import SALIENT, Salient, default_scorer
from patchrank.scorers import SCORERS
from patchrank.search.plan import threads
from patchrank.spec import RESTS, PruneSpec
from patchrank.tower import TowerConfig
from predictors import schedule_search as families
from predictors.cache import Tokens, encode, part, split_items
from predictors.schedule_costs import MacCosts, StageCosts, total
from predictors.schedule_report import advice, as_csv, make_rows, markdown
from predictors.schedule_times import TimeCosts, measure

SEARCHED = "searched"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Find cuts and counts for a budget: time every stage, try small families of schedules, keep the best feature."""

    model: str = "embedded"
    """Open_clip name, timm name, folder, file, or "embedded": the small model in the package."""
    pretrained: str = ""
    """Open_clip tag or checkpoint file of --model."""
    data: str = "digits"
    """Data set of the images that decide; labels are not read."""
    data_root: Path | None = None
    """Folder that holds the data sets; without it $PATCHRANK_ASSETS/data."""
    split: str = "train"
    """Split of these images ("all" for a flat folder)."""
    macs: float | None = None
    """Budget: share of the dense image tower's MACs. Default 0.7."""
    ms: float | None = None
    """Instead of --macs: milliseconds per image on this machine, at --batch-size."""
    rest: str = "fold"
    """What becomes of the patches that are not kept: "fold" or "drop"."""
    num_images: int = 128
    """Images that decide; with few of them chance does."""
    held_out: int = 48
    """Other images, on which the table's cosines are taken."""
    num_moves: int = 24
    """Single moves tried on the best schedule; 0: none."""
    batch_size: int = 16
    """Images per call when timing."""
    rounds: int = 9
    """Timings of each stage; the fastest counts."""
    seed: int = 0
    """Seed of the moves."""
    threads: int | None = None
    """CPU threads; without it torch's default."""
    device: str = "cpu"
    """Where to compute: cpu or cuda."""
    out: Path = Path("out/schedule")
    """Folder of schedule.json, schedule.csv and schedule.md."""


def check(config: ScheduleConfig) -> None:
    """Check all that needs neither model nor data. Raises: UserError."""
    if config.data not in CATALOG:
        raise UserError(f"--data {config.data}: unknown; choose one of {', '.join(CATALOG)}")
    if config.rest not in RESTS:
        raise UserError(f"--rest {config.rest}: unknown; choose one of {', '.join(RESTS)}")
    if config.macs is not None and config.ms is not None:
        raise UserError(f"--macs {config.macs:g} --ms {config.ms:g}: exactly one of them is the budget; drop one")
    if config.macs is not None:
        check_macs(config.macs)
    if config.ms is not None and not config.ms > 0:
        raise UserError(f"--ms {config.ms:g}: must be positive")
    for name in ("num_images", "held_out", "batch_size", "rounds"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be 1 or more")
    if config.num_moves < 0:
        raise UserError(f"--num-moves {config.num_moves}: must be 0 or more")


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
    specs = _search(config, tower_config, manner, share, costs, cost, judges[0], quiet)
    rows = make_rows(tower, specs, scorer, times, judges, config.rounds)
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
) -> dict[str, PruneSpec]:
    """The presets, the best of every family, and the best of all after the moves. Raises: UserError if none fits."""
    candidates = {
        "one cut": families.one_cuts(tower_config, share, manner, cost),
        "equal ratios": families.spans(tower_config, share, manner, cost),
    }
    if not any(candidates.values()):
        raise UserError(f"the budget, {share:.2f} of the dense cost, is below what any schedule reaches; raise it")
    num = sum(map(len, candidates.values())) + tower_config.num_layers * len(families.TABLE_KEEPS)
    with tqdm(total=num + config.num_moves, unit=" schedules", desc="search", disable=quiet) as bar:

        def counted(spec: PruneSpec) -> float:
            bar.update()
            return judge(spec)

        table = families.damage_table(tower_config, manner, counted)
        candidates["programme"] = families.programmes(tower_config, share, manner, table, costs, cost)
        best: dict[str, tuple[float, PruneSpec]] = {}
        for specs in candidates.values():
            values = {name: (counted(spec), spec) for name, spec in specs.items()}
            if values:
                name = max(values, key=lambda name: values[name][0])
                best[name] = values[name]
        _, winner = max(best.values(), key=lambda found: found[0])
        if winner.where == "inside":
            winner = families.improve(
                winner, share, tower_config, cost, counted, num_moves=config.num_moves, seed=config.seed
            )
    return _presets(tower_config, share, manner, cost) | {n: spec for n, (_, spec) in best.items()} | {SEARCHED: winner}


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
