"""`python -m predictors.train`: a scorer (and metric, and added tokens) for a frozen tower, saved with the tower."""

import torch

from patchrank import cli
from patchrank.atomic import write_json
from patchrank.loading import LoadedClip, load_clip
from patchrank.macs import pruned_macs
from patchrank.pretrain.distributed import ALONE, World, joined
from patchrank.pruned import PrunedTower
from patchrank.scorers import SCORERS
from patchrank.search.plan import threads
from predictors import artifact
from predictors.building import build_parts, start_metric
from predictors.config import TrainConfig, check_train
from predictors.costs import cost_with
from predictors.fit import Course, fit
from predictors.judging import pruned_features, text_table
from predictors.objective import make_task
from predictors.prepare import golden_scores, load_images, load_store, range_around, train_spec
from predictors.reporting import closing_table, make_report, rows_of, summary, without_training
from predictors.schedules import check_range

_FEW = 32
"""Images that a metric starts from."""


def main(config: TrainConfig) -> None:
    """Train as `config` says, or go on with what is in --out; print where the result is and how good it is."""
    check_train(config)
    with threads(config.threads), joined(config.device) as world:
        clip = load_clip(config.model, config.pretrained, config.device)
        train(config, clip, quiet=not world.leads, world=world)


def train(
    config: TrainConfig,
    clip: LoadedClip,
    *,
    quiet: bool = True,
    world: World = ALONE,
) -> PrunedTower:
    """Train on `config.data`; write state, log, the pruned tower and results.json into `config.out`; return the tower.

    Under torchrun every process takes a part of each batch; the first one writes.
    Raises: UserError for flags that do not fit the model or the data.
    """
    parts = build_parts(config, clip)
    num_added = config.num_added if config.added else 0
    spec = train_spec(config, clip.tower.config, cost_with(parts.scorer, parts.added, num_added))
    counts = check_range(config.keep_range or range_around(spec), clip.tower.config.num_patches)
    store = load_store(config, clip, spec)
    images = load_images(config, clip, spec.cuts[0][0], store, quiet=quiet, world=world)
    start_metric(parts.scorer, clip.tower, spec, images.train.x_nLC[:_FEW])
    pruned = PrunedTower(clip.tower, spec, parts.scorer, parts.added)
    plain = without_training(train_spec(config, clip.tower.config, pruned_macs))
    untrained = PrunedTower(clip.tower, plain, SCORERS["random"](clip.tower.config.grid))
    task = make_task(config, pruned, parts.learned, images, golden_scores(store, images.train), counts, world)
    course = Course.of(config)
    asked = config.settings() | {"weights_hash": clip.weights_hash}
    found = fit(task, course, config.out, asked, quiet=quiet, tensorboard=config.tensorboard, world=world)
    pruned.eval().requires_grad_(False)
    if not world.leads:
        return pruned
    with torch.no_grad():
        feature_nD = pruned_features(pruned, images.held_out, pruned.spec.cuts[0][0])
        report = make_report("predictors.train", pruned, feature_nD, untrained, images, found)
        table = closing_table(config, pruned, images, store) if config.table else []
    settings = config.settings()
    mode = artifact.save(config.out, pruned, parts.rows, clip.weights_hash, {"training": settings})
    report = {"mode": mode, "settings": settings} | report | {"table": rows_of(table)}
    write_json(config.out / "results.json", report)
    if not quiet:
        print(summary(report))
        if table:
            print(text_table(table, f"{config.data} {config.split}, {config.table} held-out images"))
        print(f"the pruned tower is in {config.out}; load it with predictors.load_pruned")
    return pruned


if __name__ == "__main__":
    cli.run(main, TrainConfig, prog="python -m predictors.train")
