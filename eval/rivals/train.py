"""`python -m eval.rivals.train`: what the learned rivals need, made without labels from the frozen tower alone.

Images, loss, loop and judgement are those of `predictors.train`, so equal --num-steps or seconds are an equal chance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eval.rival_files import parse_files
from eval.rivals import CALIBRATED, FILES, RIVALS, build, calibrated, diffrate, dtem, rates, shallow, tome
from eval.rivals.budget import class_token
from eval.rivals.dtem_soft import soft_features
from eval.rivals.walk import blocks_between
from patchrank import cli
from patchrank.atomic import write_json
from patchrank.errors import UserError
from patchrank.loading import LoadedClip, load_clip
from patchrank.macs import dense_macs
from patchrank.pretrain.draws import generator, sampler
from patchrank.provenance import command, machine, versions
from patchrank.search.plan import place, threads
from patchrank.tower import VisionTower
from predictors.cache import Tokens, first
from predictors.config import Common, check_common
from predictors.fit import Course, Task, fit
from predictors.judging import judge
from predictors.losses import feature_distance, feature_error
from predictors.prepare import Images, load_images


@dataclass(frozen=True, kw_only=True)
class RivalTrainConfig(Common):
    """Train what a learned rival needs: DTEM's embedding, a shallower tower, DiffRate's rates, a calibration."""

    method: str = "dtem"
    """dtem, shallow, diffrate or calibrate."""
    rival: str = "tome"
    """Row that calibrate re-fits LayerNorms and biases for, at --macs."""
    lora_rank: int = 0
    """Rank of the corrections that calibrate also trains for every linear map; 0: none."""
    files: tuple[str, ...] = ()
    """What that row needs, as dtem=out/dtem."""
    model: str = "embedded"
    """Open_clip name, timm name, folder, file, or "embedded": the small model in the package."""
    pretrained: str = ""
    """Open_clip tag or checkpoint file of --model."""
    macs: float = 0.7
    """Budget: depth of the shallow tower, budget of the searched rates, where dtem is judged."""
    macs_range: tuple[float, float] = (0.45, 0.85)
    """Budgets that dtem's training draws from; one embedding serves them all."""
    num_searched: int = 16
    """Train images that diffrate's search looks at."""
    lr: float = 5e-4
    """Peak learning rate; for dtem on a ViT-Ti 1e-4 is better."""
    weight_decay: float = 0.01
    """Decay of the weights."""
    out: Path = Path("out/rivals")
    """Folder for the result, and for the state of the run: the same command goes on after a kill."""


_SPANS = ((0, 11), (2, 5), (2, 10))
"""Blocks of 12 that the rows of the table merge in."""


def check(config: RivalTrainConfig) -> None:
    """Check all that needs neither model nor data. Raises: UserError."""
    check_common(config)
    if config.method not in METHODS:
        raise UserError(f"--method {config.method}: unknown; choose one of {', '.join(METHODS)}")
    if config.rival not in CALIBRATED:
        raise UserError(f"--rival {config.rival}: cannot be calibrated; choose one of {', '.join(CALIBRATED)}")
    low, high = config.macs_range
    if not 0.0 < low <= high <= 1.0:
        raise UserError(f"--macs-range {low:g} {high:g}: must rise within (0, 1]; 0.45 0.85 is the default")
    if not 0.0 < config.macs <= 1.0:
        raise UserError(f"--macs {config.macs:g}: must lie in (0, 1]; 0.7 is 70 % of the dense MACs")
    files = parse_files(config.files)
    for needed in RIVALS[config.rival].needs if config.method == "calibrate" else ():
        if needed not in files:
            raise UserError(f"--rival {config.rival}: give --files {needed}=path, {FILES[needed]}")
    if config.lora_rank < 0:
        raise UserError(f"--lora-rank {config.lora_rank}: must be 0 or more")
    if config.num_searched < 1:
        raise UserError(f"--num-searched {config.num_searched}: must be 1 or more")


def main(config: RivalTrainConfig) -> None:
    """Train as `config` says, or go on with what is in --out; print where the result is and how good it is."""
    check(config)
    if (num_processes := place()[1]) > 1:
        raise UserError(f"WORLD_SIZE={num_processes}: this command is one process; start it without torchrun")
    with threads(config.threads):
        clip = load_clip(config.model, config.pretrained, config.device)
        report = train(config, clip, quiet=False)
    print(
        f"{config.method}: cosine {report['cosine_before']:.4f} -> {report['cosine']:.4f} on {report['num_held_out']} "
        f"held-out images at a budget of {config.macs:g}; the result is in {config.out}"
    )


def train(config: RivalTrainConfig, clip: LoadedClip, *, quiet: bool = True) -> dict[str, Any]:
    """Make the file that the row reads, and `<method>_results.json`, in --out; return the report.

    Raises: UserError for flags that do not fit the model or the data.
    """
    images = load_images(config, clip, 0, quiet=quiet)
    found = METHODS[config.method](config, clip, images, quiet)
    origin = {"command": command("eval.rivals.train"), "versions": versions(), "machine": machine()}
    sizes = {"num_train": len(images.train), "num_held_out": len(images.held_out)}
    report = origin | {"settings": config.settings(), "weights_hash": clip.weights_hash} | sizes | found
    write_json(config.out / f"{config.method}_results.json", report)
    return report


@torch.no_grad()
def _cosine(features: Callable[[Tensor], Tensor], tokens: Tokens) -> float:
    feature_nD = torch.cat([features(x_BLC) for x_BLC in tokens.x_nLC.split(32)])
    return judge(feature_nD, tokens)["cosine"]


def _fit(
    config: RivalTrainConfig,
    clip: LoadedClip,
    images: Images,
    learned: nn.Module,
    train_features: Callable[[Tensor, int], Tensor],
    true_features: Callable[[Tensor], Tensor],
    run: str,
    quiet: bool,
) -> dict[str, Any]:
    """Distil: `train_features` (tokens, step) with a gradient, judged by `true_features`; both -> (B, D)."""
    tokens, judged = images.train, first(images.held_out, config.judged)

    def batch(step: int) -> Tensor:
        return sampler(len(tokens), config.batch_size, config.seed, step)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        index_B = batch(step)
        feature_BD, dense_BD = train_features(tokens.x_nLC[index_B], step), tokens.feature_nD[index_B]
        distance, error = feature_distance(feature_BD, dense_BD), feature_error(feature_BD, dense_BD)
        return distance + error, {"distill": distance.item(), "error": error.item()}

    @torch.no_grad()
    def judgement() -> dict[str, float]:
        feature_nD = torch.cat([true_features(x_BLC) for x_BLC in judged.x_nLC.split(32)])
        return judge(feature_nD, judged, images.classify)

    task = Task(
        learned=learned,
        loss=loss,
        judge=judgement,
        batch_name=lambda step: ", ".join(tokens.ids[i] for i in batch(step)[:4].tolist()) + ", ...",
    )
    course = Course.of(config)
    before = _cosine(true_features, images.held_out)
    settings = config.settings() | {"weights_hash": clip.weights_hash}
    found = fit(task, course, config.out / run, settings, quiet=quiet, tensorboard=config.tensorboard)
    learned.requires_grad_(False)
    return {"cosine_before": before, "cosine": _cosine(true_features, images.held_out), **found}


def plans(tower: VisionTower, macs_range: tuple[float, float]) -> list[dict[int, int]]:
    """The merge counts that dtem's training draws from: all within the range, spread over the blocks of its rows.

    Raises: UserError for a range that merging cannot reach.
    """
    config, found = tower.config, []
    low, high = (share * dense_macs(config) for share in macs_range)
    for span in _SPANS:
        layers = blocks_between(config, *span)
        spread = (tome.spread_r(config, layers, total) for total in range(1, config.num_patches * len(layers)))
        distinct = {tuple(plan.items()): plan for plan in spread}
        found += [plan for plan in distinct.values() if low <= tome.tome_macs(config, plan) <= high]
    if not found:
        raise UserError(f"--macs-range {macs_range[0]:g} {macs_range[1]:g}: no merging costs that here; widen it")
    return found


def _dtem(config: RivalTrainConfig, clip: LoadedClip, images: Images, quiet: bool) -> dict[str, Any]:
    tower = clip.tower
    embedding = dtem.Embedding(tower.config).to(tower.position.device).start_from_keys(tower)
    drawn = plans(tower, config.macs_range)
    true = dtem.with_embedding(tower, config.macs, embedding)

    def features(x_BLC: Tensor, step: int) -> Tensor:
        number = int(torch.randint(len(drawn), (), generator=generator(config.seed, "merges", step)))
        return soft_features(tower, embedding, drawn[number], x_BLC)

    found = _fit(config, clip, images, embedding, features, true.forward_from, "dtem_run", quiet)
    dtem.save(config.out / dtem.FILE, embedding, clip.weights_hash)
    return found


def _shallow(config: RivalTrainConfig, clip: LoadedClip, images: Images, quiet: bool) -> dict[str, Any]:
    depth = shallow.depth_for(clip.tower.config, config.macs)
    small = shallow.student(clip.tower, depth)
    parts = nn.ModuleList([small.blocks, small.norm, small.proj, *([] if small.pool is None else [small.pool])])
    parts.requires_grad_(True)

    def features(x_BLC: Tensor, step: int) -> Tensor:
        return small.finish(x_BLC, 0)

    found = _fit(config, clip, images, parts, features, lambda x_BLC: small.finish(x_BLC, 0), f"run_{depth}", quiet)
    shallow.save(config.out, small, clip.weights_hash)
    return {"depth": depth} | found


def _diffrate(config: RivalTrainConfig, clip: LoadedClip, images: Images, quiet: bool) -> dict[str, Any]:
    class_token(clip.tower, "diffrate")
    few = first(images.train, config.num_searched)
    best, values = rates.search(
        clip.tower, config.macs, few.x_nLC, few.feature_nD, num_steps=config.num_steps, seed=config.seed, quiet=quiet
    )
    schedule = {"schedule": best.to_dict(), "weights_hash": clip.weights_hash, "macs": config.macs}
    write_json(config.out / diffrate.FILE, schedule)
    before, after = (
        _cosine(diffrate.with_schedule(clip.tower, config.macs, one).forward_from, images.held_out)
        for one in (diffrate.equal(clip.tower.config), best)
    )
    return {"cosine_before": before, "cosine": after, "searched": values, **schedule}


def _calibrate(config: RivalTrainConfig, clip: LoadedClip, images: Images, quiet: bool) -> dict[str, Any]:
    rival = build(config.rival, calibrated.copy_of(clip.tower), config.macs, parse_files(config.files))
    small, run = calibrated.learnable(rival, config.lora_rank, config.seed), f"calibrate_{config.rival}_{config.macs:g}"
    found = _fit(
        config, clip, images, small, lambda x_BLC, step: rival.forward_from(x_BLC), rival.forward_from, run, quiet
    )
    said = f"{config.data} {config.split}, {config.limit or 'all'} images, no labels, {config.num_steps} steps"
    if config.lora_rank:
        said += f", rank {config.lora_rank}"
    calibrated.save(config.out, config.rival, config.macs, small, clip.weights_hash, said, config.lora_rank)
    return {"rival": config.rival} | found


METHODS: dict[str, Callable[[RivalTrainConfig, LoadedClip, Images, bool], dict[str, Any]]] = {
    "dtem": _dtem,
    "shallow": _shallow,
    "diffrate": _diffrate,
    "calibrate": _calibrate,
}
"""Name -> (config, model, images, quiet) -> numbers for the report; each writes the file that its row reads."""


if __name__ == "__main__":
    cli.run(main, RivalTrainConfig, prog="python -m eval.rivals.train")
