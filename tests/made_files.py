"""What the rows of `eval.rivals.RIVALS` need, made for any tower without training."""

from pathlib import Path

import torch

from eval.rivals import CALIBRATED, build, calibrated, diffrate, dtem, shallow
from patchrank.atomic import write_json
from patchrank.checkpoints.weights import weights_hash
from patchrank.errors import UserError
from patchrank.presets import default_layer, spec_for_macs
from patchrank.pruned import PrunedTower
from patchrank.search.ranking import ranking_from_score
from patchrank.search.store import SCHEMA, begin, complete, write_shard
from patchrank.tower import VisionTower
from predictors import artifact
from predictors.tables import build_added, build_scorer, scorer_options


def make_store(folder: Path, tower: VisionTower, **changes) -> Path:
    """A ranking store of three images with random rankings."""
    config = tower.config
    request = dict(schema=SCHEMA, weights_hash=weights_hash(tower), layer=default_layer(config.num_layers))
    request |= dict(num_patches=config.num_patches, shard_size=3, split="train") | changes
    begin(folder, request, 1)
    random = torch.Generator().manual_seed(0)
    rankings = [ranking_from_score(torch.rand(config.num_patches, generator=random)) for _ in range(3)]
    write_shard(folder, 0, request, ["a", "b", "c"], [], rankings)
    complete(folder, request, 1)
    return folder


def make_trained(folder: Path, tower: VisionTower, *, rest: str = "fold", added: str | None = None) -> Path:
    """A pruned tower with an untrained linear scorer, as `predictors.train` saves it."""
    config = tower.config
    torch.manual_seed(0)
    spec = spec_for_macs(config, 0.8, rest=rest)
    options = {"metric_dim": 8 if rest == "fold" else 0}
    rows = {"scorer": "linear", "scorer_options": scorer_options(config, **options), "model": "x", "pretrained": ""}
    tokens = None
    if added is not None:
        spec = type(spec)(**(vars(spec) | {"num_added": 1}))
        tokens = build_added(added, config, num_added=1)
        rows |= {"added": added, "added_options": {"width": config.width, "num_added": 1}}
    pruned = PrunedTower(tower, spec, build_scorer("linear", config, **options), tokens)
    artifact.save(folder, pruned, rows, weights_hash(tower), {})
    return folder


def make_calibrations(
    folder: Path, tower: VisionTower, budgets: tuple[float, ...], files: dict[str, Path], lora_rank: int = 0
) -> Path:
    """Calibrations that change nothing, of every row that has one and reaches the budget."""
    for name in CALIBRATED:
        for macs in budgets:
            try:
                rival = build(name, calibrated.copy_of(tower), macs, files)
                small = calibrated.learnable(rival, lora_rank)
                calibrated.save(folder, name, macs, small, weights_hash(tower), lora_rank=lora_rank)
            except UserError:
                continue
    return folder


def make_files(folder: Path, tower: VisionTower, budgets: tuple[float, ...]) -> dict[str, Path]:
    """{row of `FILES`: its path} under `folder`, all for this tower, calibrated rivals at `budgets`."""
    source = weights_hash(tower)
    dtem.save(folder / "dtem" / dtem.FILE, dtem.Embedding(tower.config).start_from_keys(tower), source)
    if tower.config.num_prefix:
        rates = diffrate.equal(tower.config).to_dict()
        write_json(folder / "diffrate" / diffrate.FILE, {"schedule": rates})
    for depth in range(1, tower.config.num_layers + 1):
        shallow.save(folder / "shallow", shallow.student(tower, depth), source)
    make_store(folder / "mean-rank", tower)
    make_trained(folder / "trained", tower)
    make_trained(folder / "trained-drop", tower, rest="drop")
    make_trained(folder / "tokens", tower, added="summary")
    names = ("mean-rank", "dtem", "diffrate", "shallow", "trained", "trained-drop", "tokens")
    files = {name: folder / name for name in names} | {"calibrated": folder / "trained"}
    made = {
        name: make_calibrations(folder / name, tower, budgets, files, lora_rank)
        for name, lora_rank in (("calibrated-rivals", 0), ("lora-rivals", 1))
    }
    return files | made
