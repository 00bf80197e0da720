"""`python -m predictors.calibrate`: what stands behind the cut, re-fitted to pruned tokens in its small parameters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchrank import cli
from patchrank.atomic import write_json
from patchrank.errors import UserError
from patchrank.loading import LoadedClip, load_clip
from patchrank.pretrain.distributed import ALONE, World, joined
from patchrank.pretrain.draws import sampler
from patchrank.pruned import PrunedTower
from patchrank.search.plan import threads
from predictors import artifact, lora
from predictors.cache import first
from predictors.calibration import calibratable
from predictors.confidence import confidence, said
from predictors.config import CalibrateConfig, check_calibrate
from predictors.fit import Course, Task, fit
from predictors.judging import judge, pruned_features
from predictors.losses import answer_divergence, feature_distance, feature_error
from predictors.objective import with_spec
from predictors.prepare import Images, at_budget, load_images
from predictors.readout import STRENGTHS, ridge_readout, with_readout
from predictors.reporting import make_report, summary


def main(config: CalibrateConfig) -> None:
    """Calibrate as `config` says, or go on with what is in --out; print where the result is and how good it is."""
    check_calibrate(config)
    record = artifact.read_training(config.pruned)
    with threads(config.threads), joined(config.device) as world:
        settings = record["training"]
        clip = load_clip(settings["model"], settings["pretrained"], config.device)
        calibrate(config, clip, quiet=not world.leads, world=world)


def calibrate(
    config: CalibrateConfig,
    clip: LoadedClip,
    *,
    quiet: bool = True,
    world: World = ALONE,
) -> PrunedTower:
    """Re-fit a saved pruned tower of this model; write state, log, the calibrated tower and results.json; return it.

    Features only: what else would make its answers as sure as the unpruned ones is in the record, as `logit_factor`.

    Raises: UserError for a tower that was made from other weights.
    """
    record = artifact.read_training(config.pruned)
    pruned = artifact.load_pruned(config.pruned, config.device)
    if record["source_weights_hash"] != clip.weights_hash:
        raise UserError(
            f"--pruned {config.pruned}: made from weights {record['source_weights_hash'][:12]}, this model has "
            f"{clip.weights_hash[:12]}; give the --out of predictors.train for this model"
        )
    if config.macs is not None:
        pruned = with_spec(pruned, at_budget(pruned, config.macs))
    source = PrunedTower(clip.tower, pruned.spec, pruned.scorer, pruned.added)
    if not config.size_bias:
        pruned = with_spec(pruned, replace(pruned.spec, size_bias=False))
    images = load_images(config, clip, pruned.spec.cuts[0][0], quiet=quiet, world=world)
    refitted, found = refit(config, clip.weights_hash, pruned, images, config.out, quiet=quiet, world=world)
    with torch.no_grad():
        if config.readout:
            refitted, found["readout_strength"] = best_readout(config, refitted, images)
        if not world.leads:
            return refitted
        feature_nD = pruned_features(refitted, images.held_out, pruned.spec.cuts[0][0])
        report = make_report("predictors.calibrate", refitted, feature_nD, source, images, found)
        report["confidence"] = confidence(refitted, feature_nD, images)
    training = {"training": record["training"], "calibration": config.settings(), "confidence": report["confidence"]}
    mode = artifact.save(config.out, refitted, record["rows"], clip.weights_hash, training)
    report = {"mode": mode, "settings": config.settings()} | report
    write_json(config.out / "results.json", report)
    if not quiet:
        print(summary(report))
        if report["confidence"]:
            print(said(report["confidence"]))
        print(f"the pruned tower is in {config.out}; load it with predictors.load_pruned")
    return refitted


def refit(
    config: CalibrateConfig,
    weights_hash: str,
    pruned: PrunedTower,
    images: Images,
    folder: Path,
    *,
    quiet: bool = True,
    world: World = ALONE,
) -> tuple[PrunedTower, dict[str, Any]]:
    """The same walk with its small parameters re-fitted, in eval mode, and what `fit` says; its state is in `folder`.

    Args: weights_hash names the tower's weights before; images, tokens that enter the block of the first cut.
    """
    refitted, small = calibratable(pruned, config.parts, config.lora_rank, config.seed)
    course = Course.of(config)
    settings = config.settings() | {"weights_hash": weights_hash, "spec": pruned.spec.to_dict()}
    task = make_task(config, refitted, small, images, world)
    found = fit(task, course, folder, settings, quiet=quiet, tensorboard=config.tensorboard, world=world)
    refitted.eval().requires_grad_(False)
    lora.absorb(refitted.tower)
    return refitted, found


def best_readout(config: CalibrateConfig, pruned: PrunedTower, images: Images) -> tuple[PrunedTower, float | None]:
    """The tower with the readout that is best on the judged images, and its strength (None: none helps)."""
    layer, judged = pruned.spec.cuts[0][0], first(images.held_out, config.judged)
    feature_nD = pruned_features(pruned, images.train, layer)
    held_out_nD = pruned_features(pruned, judged, layer)
    best, found = judge(held_out_nD, judged)["distance"], (pruned, None)
    for strength in STRENGTHS:
        map_DD, offset_D = ridge_readout(feature_nD, images.train.feature_nD, strength)
        distance = judge(held_out_nD @ map_DD.T + offset_D, judged)["distance"]
        if distance < best:
            best, found = distance, (with_readout(pruned, map_DD, offset_D), strength)
    return found


def make_task(
    config: CalibrateConfig,
    pruned: PrunedTower,
    small: torch.nn.Module,
    images: Images,
    world: World = ALONE,
) -> Task:
    """Distillation of the dense feature, direction and length, through the true pruned walk at its own spec."""
    tokens, layer, judged = images.train, pruned.spec.cuts[0][0], first(images.held_out, config.judged)

    def batch(step: int) -> Tensor:
        return sampler(len(tokens), config.batch_size, config.seed, step)[world.part(config.batch_size)]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        index_B = batch(step)
        feature_BD, dense_BD = pruned.forward_from(tokens.x_nLC[index_B], layer), tokens.feature_nD[index_B]
        distance, error = feature_distance(feature_BD, dense_BD), feature_error(feature_BD, dense_BD)
        total, numbers = distance + error, {"distill": distance.item(), "error": error.item()}
        if config.answers and images.classify is not None:
            answers = answer_divergence(images.classify(feature_BD), images.classify(dense_BD))
            total, numbers = total + config.answers * answers, numbers | {"answers": answers.item()}
        return total, numbers

    return Task(
        learned=small,
        loss=loss,
        judge=lambda: judge(pruned_features(pruned, judged, layer), judged, images.classify),
        batch_name=lambda step: ", ".join(tokens.ids[i] for i in batch(step)[:4].tolist()) + ", ...",
        aim=lambda found: found["distance"] + config.answers * found.get("kl", 0.0),
    )


if __name__ == "__main__":
    cli.run(main, CalibrateConfig, prog="python -m predictors.calibrate")
