"""`python -m eval pretrain-cost`: what each pretraining recipe costs in time and memory, beside plain CLIP.

All recipes take turns within every round, on one pair of towers, so that a slow minute of the machine falls on all of
them. Memory is the peak of a process of its own for each recipe. Batches are ready in memory: reading and cropping
pictures is not timed.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from eval.pretrain_steps import Moments, build, small_config, step_seconds, towers_of, vit_b_config
from eval.tables import as_text
from patchrank.atomic import write_json
from patchrank.errors import UserError
from patchrank.pretrain.cost import cost_table
from patchrank.pretrain.recipes import RECIPES
from patchrank.provenance import command, machine, versions


@dataclass(frozen=True, kw_only=True)
class PretrainCostConfig:
    """Training time and memory of every pretraining recipe against plain CLIP, beside predicted and reported ratios."""

    recipes: tuple[str, ...] = tuple(RECIPES)
    """Rows to measure; clip always takes part."""
    batch_size: int = 16
    """Pairs of a step."""
    rounds: int = 5
    """Timed rounds; every recipe makes one step in each."""
    threads: int = 2
    """CPU threads."""
    device: str = "cpu"
    """cpu or cuda."""
    small: bool = False
    """Towers of the small setting instead of ViT-B/16 with a 12-layer text tower: seconds instead of minutes."""
    memory: bool = True
    """Also measure peak memory, one process a recipe."""
    out: Path = Path("out/pretrain-cost")
    """Folder of pretrain_cost.json."""


def main(config: PretrainCostConfig) -> None:
    """Time all recipes in turns, measure their memory, and write the table."""
    _check(config)
    torch.set_num_threads(config.threads)
    make = small_config if config.small else vit_b_config
    names = tuple(dict.fromkeys(("clip", *config.recipes)))
    seconds = _measure(names, config, make)
    memory = (
        {name: _memory(name, config) for name in tqdm(names, desc="memory", unit="recipe")} if config.memory else {}
    )
    predicted = {row.recipe: row for row in cost_table(make("clip", config.batch_size, config.device))}
    rows = []
    for name in names:
        ratios = [own / plain for own, plain in zip(seconds[name], seconds["clip"])]
        rows.append(
            {
                "recipe": name,
                "macs_ratio": predicted[name].macs_ratio,
                "time_ratio": statistics.median(ratios),
                "time_ratio_low": min(ratios),
                "time_ratio_high": max(ratios),
                "memory_ratio": memory[name] / memory["clip"] if memory else None,
                "reported_time_ratio": predicted[name].reported_time_ratio,
                "seconds": statistics.median(seconds[name]),
                "peak_bytes": memory.get(name),
                "image_tokens": predicted[name].image_tokens,
                "gmacs_per_pair": predicted[name].macs / 1e9,
            }
        )
    origin = {"command": command("eval"), "versions": versions(), "machine": machine(), "threads": config.threads}
    setup = {"rounds": config.rounds, "batch_size": config.batch_size, "model": "small" if config.small else "ViT-B/16"}
    write_json(config.out / "pretrain_cost.json", origin | setup | {"rows": rows})
    print(as_lines(rows))


def as_lines(rows: list[dict]) -> str:
    """The table for a terminal; "reported" is the papers'."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    head = ["recipe", "x MACs", "x time", "lowest", "highest", "x memory", "reported x time"]
    columns = ("macs_ratio", "time_ratio", "time_ratio_low", "time_ratio_high", "memory_ratio", "reported_time_ratio")
    return as_text(head, [[row["recipe"], *(shown(row[name]) for name in columns)] for row in rows])


def _check(config: PretrainCostConfig) -> None:
    unknown = [name for name in config.recipes if name not in RECIPES]
    if unknown:
        raise UserError(f"--recipes {unknown[0]}: unknown; choose among {', '.join(RECIPES)}")
    for name, least in (("batch_size", 2), ("rounds", 1), ("threads", 1)):
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be {least} or more")
    if config.device not in ("cpu", "cuda"):
        raise UserError(f"--device {config.device}: unknown; choose cpu or cuda")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu")


def _measure(names: tuple[str, ...], config: PretrainCostConfig, make) -> dict[str, list[float]]:
    """Seconds of one step by recipe and round; one more round before them is discarded."""
    pair = towers_of(make("clip", config.batch_size, config.device))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    moments: Moments = {}
    with tqdm(total=len(names) * (config.rounds + 1), desc="rounds", unit="step") as bar:
        for number in range(config.rounds + 1):
            for name in names:
                took = step_seconds(build(make(name, config.batch_size, config.device), pair, moments))
                if number > 0:
                    seconds[name].append(took)
                bar.update()
    return seconds


def _memory(name: str, config: PretrainCostConfig) -> int:
    """Peak bytes of a fresh process that makes two steps of one recipe."""
    asked = {"recipe": name, "batch_size": config.batch_size, "threads": config.threads, "device": config.device,
             "small": config.small}  # fmt: skip
    words = [sys.executable, "-m", "eval.pretrain_steps", json.dumps(asked)]
    found = subprocess.run(words, capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"{name}: its process for memory failed: {found.stderr.strip().splitlines()[-1:]}")
    return json.loads(found.stdout)
