"""`python -m predictors.calibrate`: LayerNorms and biases behind the cut, re-fitted to pruned tokens without labels."""

import torch
from torch import Tensor

from patchrank import cli
from patchrank.atomic import write_json
from patchrank.checkpoints.weights import weights_hash
from patchrank.errors import UserError
from patchrank.loading import LoadedClip, load_clip
from patchrank.pretrain.draws import sampler
from patchrank.pruned import PrunedTower
from patchrank.search.plan import threads
from predictors import artifact
from predictors.calibration import calibratable
from predictors.config import CalibrateConfig, check_calibrate
from predictors.costs import cost_with
from predictors.fit import Course, Task, fit
from predictors.judging import judge, pruned_features
from predictors.losses import feature_distance, feature_error
from predictors.objective import with_spec
from predictors.prepare import Images, load_images
from predictors.reporting import make_report, summary
from predictors.schedules import within


def main(config: CalibrateConfig) -> None:
    """Calibrate as `config` says, or go on with what is in --out; print where the result is and how good it is."""
    check_calibrate(config)
    record = artifact.read_training(config.pruned)
    with threads(config.threads):
        settings = record["training"]
        clip = load_clip(settings["model"], settings["pretrained"], config.device)
        calibrate(config, clip, quiet=False)


def calibrate(config: CalibrateConfig, clip: LoadedClip, *, quiet: bool = True) -> PrunedTower:
    """Re-fit a saved pruned tower of this model; write state, log, the calibrated tower and results.json; return it.

    Raises: UserError for a tower of other weights or one that is calibrated already.
    """
    record = artifact.read_training(config.pruned)
    pruned = artifact.load_pruned(config.pruned, config.device)
    if record["mode"] != "frozen" or weights_hash(pruned.tower) != clip.weights_hash:
        raise UserError(
            f"--pruned {config.pruned}: is {record['mode']}, weights {weights_hash(pruned.tower)[:12]}; must be "
            f"frozen, with the weights {clip.weights_hash[:12]} of the model: give the --out of predictors.train"
        )
    if config.macs is not None:
        cost = cost_with(pruned.scorer, pruned.added, pruned.spec.num_added)
        pruned = with_spec(pruned, within(pruned.spec, config.macs, pruned.config, cost))
    images = load_images(config, clip, pruned.spec.cuts[0][0], quiet=quiet)
    refitted, small = calibratable(pruned, config.parts)
    course = Course(
        num_steps=config.num_steps,
        lr=config.lr,
        weight_decay=config.weight_decay,
        save_every=config.save_every,
        patience=config.patience,
    )
    settings = config.settings() | {"weights_hash": clip.weights_hash, "spec": pruned.spec.to_dict()}
    found = fit(make_task(config, refitted, small, images), course, config.out, settings, quiet=quiet)
    refitted.eval().requires_grad_(False)
    with torch.no_grad():
        report = make_report("predictors.calibrate", refitted, pruned, images, found)
    training = {"training": record["training"], "calibration": config.settings()}
    mode = artifact.save(config.out, refitted, record["rows"], clip.weights_hash, training)
    report = {"mode": mode, "settings": config.settings()} | report
    write_json(config.out / "results.json", report)
    if not quiet:
        print(summary(report))
        print(f"the pruned tower is in {config.out}; load it with predictors.load_pruned")
    return refitted


def make_task(config: CalibrateConfig, pruned: PrunedTower, small: torch.nn.Module, images: Images) -> Task:
    """Distillation of the dense feature, direction and length, through the true pruned walk at its own spec."""
    tokens, layer = images.train, pruned.spec.cuts[0][0]

    def batch(step: int) -> Tensor:
        return sampler(len(tokens), config.batch_size, config.seed, step)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        index_B = batch(step)
        feature_BD, dense_BD = pruned.forward_from(tokens.x_nLC[index_B], layer), tokens.feature_nD[index_B]
        distance, error = feature_distance(feature_BD, dense_BD), feature_error(feature_BD, dense_BD)
        return distance + error, {"distill": distance.item(), "error": error.item()}

    return Task(
        learned=small,
        loss=loss,
        judge=lambda: judge(pruned_features(pruned, images.held_out, layer), images.held_out, images.classify),
        batch_name=lambda step: ", ".join(tokens.ids[i] for i in batch(step)[:4].tolist()) + ", ...",
    )


if __name__ == "__main__":
    cli.run(main, CalibrateConfig, prog="python -m predictors.calibrate")
