"""`python -m patchrank.pretrain`: train a small CLIP from scratch and save it where `load_clip` finds it."""

import time

import torch

from patchrank import cli
from patchrank.atomic import write_json
from patchrank.data import load_dataset
from patchrank.loading import save_clip
from patchrank.macs import dense_macs
from patchrank.pretrain.card import card, recipe_of
from patchrank.pretrain.config import PretrainConfig, check
from patchrank.pretrain.evaluate import zero_shot_accuracy
from patchrank.pretrain.loop import Run, check_run, open_run, train
from patchrank.pretrain.pictures import Pictures
from patchrank.provenance import command, versions


def main(config: PretrainConfig) -> None:
    """Train as `config` says, going on from the state in --out; then save the model and its test accuracy."""
    check(config)
    torch.set_num_threads(config.threads)
    run = open_run(config)
    print(_cost_line(run), flush=True)
    if config.dry_run:
        return
    origin = {"command": command("patchrank.pretrain"), "versions": versions()}
    write_json(config.out / "config.json", config.settings() | origin)
    train(run)
    if run.batches.pictures.broken:
        print(f"{len(run.batches.pictures.broken)} broken pictures were skipped")
    _save(run)


def _cost_line(run: Run) -> str:
    config = run.config
    started = time.perf_counter()
    run.batches.at(run.progress.step, 1.0)
    seconds = time.perf_counter() - started
    left = config.num_steps - run.progress.step
    macs = dense_macs(config.tower_config())
    return (
        f"{config.recipe} on {config.data}: {len(run.batches.pictures.dataset.images):,} pictures, {left:,} of "
        f"{config.num_steps:,} steps of {config.batch_size} to go; image tower {macs / 1e6:.0f} million MACs a picture "
        f"({2 * macs / 1e6:.0f} million FLOPs); drawing or reading a batch takes {1000 * seconds:.0f} ms"
    )


def _save(run: Run) -> None:
    config, pair = run.config, run.pair
    accuracy = {}
    if run.val is not None:
        test = Pictures(load_dataset(config.data, root=config.data_root, split="test"), config.preprocess())
        accuracy = {"val": check_run(run)}
        accuracy["test"] = zero_shot_accuracy(pair, test, config.preprocess(), config.batch_size)
    recipe = recipe_of(config, run.progress, accuracy)
    save_clip(
        config.out,
        pair.tower,
        pair.text,
        config.preprocess(),
        pair.log_scale.exp().item(),
        name=config.name or f"{config.recipe}-{config.data}",
        recipe=recipe | {"card": card(recipe)},
    )
    print(card(recipe))
    print(f"model in {config.out}; use it with --model {config.out}")


if __name__ == "__main__":
    cli.run(main, PretrainConfig, prog="python -m patchrank.pretrain")
