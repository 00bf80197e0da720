"""What `python -m eval trained` puts side by side: dense, our towers in three modes, free scorers, rivals.

A method is an `Entry`: who it is, what it costs, and a module image (B, 3, H, W) -> feature (B, D).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from torch import nn

from eval.rivals import OURS, RIVALS, build
from patchrank.errors import UserError
from patchrank.loading import LoadedClip
from patchrank.macs import dense_macs, patches_at_cuts, pruned_macs
from patchrank.presets import spec_for_macs
from patchrank.pruned import PrunedTower
from patchrank.salient import SALIENT, Salient, salient_cost
from patchrank.scorers import SCORERS
from patchrank.spec import RESTS, PruneSpec
from patchrank.tower import TowerConfig, VisionTower
from predictors import load_pruned, read_training
from predictors.costs import learned_macs
from predictors.objective import with_spec
from predictors.prepare import at_budget

TRAINING_FREE, FROZEN, CALIBRATED = MODES = ("training-free", "frozen", "calibrated")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method at one budget, with one seed. MACs per image of the image tower; 1 MAC = 2 FLOP."""

    method: str
    family: str
    """"ours", "rival" or "oracle"."""
    mode: str
    budget: float
    image_macs: int
    run: nn.Module
    spec: PruneSpec | None = None
    """None where the method is no `PrunedTower`."""
    trained_on: str | None = None
    seed: int | None = None

    @property
    def key(self) -> str:
        """Tells methods apart in the journal."""
        rest = "" if self.spec is None else self.spec.rest
        return f"{self.method} | {self.mode} | {rest} | seed {self.seed}"

    @property
    def timed_as(self) -> str:
        """Tells method and budget apart among times."""
        return f"{self.key} {self.budget}"


def _mode(needs: Sequence[str]) -> str:
    """A rival's mode by the files that it needs; a distilled student counts as calibrated, its blocks have changed."""
    if {"calibrated-rivals", "lora-rivals", "shallow"} & set(needs):
        return CALIBRATED
    return FROZEN if needs else TRAINING_FREE


def rival_entries(
    tower: VisionTower, budgets: Sequence[float], names: Sequence[str], files: Mapping[str, Path]
) -> tuple[list[Entry], list[str]]:
    """Rows of the rivals' table, those that need files with these, and why others are missing."""
    found, missing = [], []
    for macs in budgets:
        for name in names:
            try:
                rival = build(name, tower, macs, files).eval()
            except UserError as error:
                reason = str(error).removeprefix(f"{name}: ")
                # Reports are passed on; where files lay on this machine is nobody else's business.
                for path in files.values():
                    reason = reason.replace(str(path), path.name)
                missing.append(f"{name} at {macs:g}: {reason}")
                continue
            pruned = getattr(rival, "pruned", None)
            entry = Entry(
                method=name,
                family=RIVALS[name].family if name != OURS else "ours",
                mode=_mode(RIVALS[name].needs),
                budget=macs,
                image_macs=rival.macs,
                run=rival,
                spec=getattr(pruned, "spec", None),
                trained_on=rival.trained_on,
            )
            found.append(entry)
    return found, missing


FREE: tuple[str, ...] = (*SCORERS, SALIENT)
"""Scorers that need no training."""


def _free(name: str, tower: VisionTower, macs: float, rest: str) -> tuple[PrunedTower, int]:
    """The `accurate` schedule with a free scorer, and its MACs; priorities for `suppress`, `salient` for `cover`."""
    config = tower.config
    if name == SALIENT:
        scorer, cost = Salient(config.num_prefix > 0), salient_cost(pruned_macs, config.num_prefix > 0)
    elif name == "class-attention":
        scorer, cost = SCORERS[name](config.grid), _with_class_attention
    else:
        scorer, cost = SCORERS[name](config.grid), pruned_macs
    select = "cover" if name == SALIENT else "suppress"
    spec = replace(spec_for_macs(config, macs, rest=rest, cost=cost), select=select)
    return PrunedTower(tower, spec, scorer), cost(config, spec)


def _with_class_attention(config: TowerConfig, spec: PruneSpec) -> int:
    """`patchrank.scorers.class_attention` at every cut: one query, all keys, one row of the attention."""
    counts = patches_at_cuts(config, spec)
    rows = sum(config.width * (config.width * (1 + n) + n) for n in (config.num_prefix + K for K in counts))
    return pruned_macs(config, spec) + (rows if spec.cuts else 0)


def free_entries(tower: VisionTower, budgets: Sequence[float], names: Sequence[str]) -> list[Entry]:
    """The `accurate` preset with every scorer that needs no training, each with fold and with drop."""
    usable = [name for name in names if name != "class-attention" or tower.config.num_prefix > 0]
    found = []
    for macs, name, rest in product(budgets, usable, RESTS):
        pruned, cost = _free(name, tower, macs, rest)
        entry = Entry(
            method=f"preset, {name}",
            family="ours",
            mode=TRAINING_FREE,
            budget=macs,
            image_macs=cost,
            run=pruned.eval(),
            spec=pruned.spec,
        )
        found.append(entry)
    return found


def saved_entries(clip: LoadedClip, budgets: Sequence[float], folders: Sequence[Path]) -> list[Entry]:
    """What `predictors.train` and `predictors.calibrate` left: frozen ones at every budget, calibrated at their own.

    At a budget that a frozen one was made for, it takes the place of those of its kind that were brought to it.
    Raises: UserError for a folder that cannot be read or was trained for other weights, or two of a kind at one budget.
    """
    found: dict[tuple[str, float], Entry] = {}
    made_for: dict[tuple[str, float], Path] = {}
    for folder in folders:
        record = read_training(folder)
        if record["source_weights_hash"] != clip.weights_hash:
            raise UserError(f"--trained {folder}: was trained for other weights; train it for this model")
        pruned = load_pruned(folder, clip.tower.position.device)
        macs_of = learned_macs(pruned.config, pruned.spec, pruned.scorer, pruned.added)
        own = macs_of / dense_macs(clip.tower.config)
        near = [macs for macs in budgets if abs(own - macs) <= 0.01 * macs]
        for macs in near if record["mode"] == CALIBRATED else budgets:
            entry = _saved(with_spec(pruned, pruned.spec if macs in near else at_budget(pruned, macs)), record, macs)
            place = entry.key, macs
            if macs in near and place in made_for:
                raise UserError(
                    f"--trained {made_for[place]} {folder}: the same method, mode and seed at {macs:g}; leave one out"
                )
            if macs in near:
                made_for[place] = folder
            if macs in near or place not in found:
                found[place] = entry
    return list(found.values())


def _saved(pruned: PrunedTower, record: dict, macs: float) -> Entry:
    rows, training = record["rows"], record["training"]
    last = record.get("calibration") or training
    images = f"{last['data']} {last['split']}, {last['limit'] or 'all'} images"
    tokens = f", {pruned.spec.num_added} {rows['added']} tokens" if pruned.added is not None else ""
    bias = "" if pruned.spec.size_bias else ", no size bias"
    low, high = training.get("keep_range") or (0.0, 1.0)
    rate = ", for one keep rate" if low == high else ""
    corrections = f", rank {last['lora_rank']}" if last.get("lora_rank") else ""
    return Entry(
        method=f"{rows['scorer']} scorer{tokens}{rate}{bias}{corrections}",
        family="ours",
        mode=record["mode"],
        budget=macs,
        image_macs=learned_macs(pruned.config, pruned.spec, pruned.scorer, pruned.added),
        run=pruned.eval(),
        spec=pruned.spec,
        trained_on=f"{images}, no labels, {last['num_steps']} steps",
        seed=last["seed"],
    )
