"""`python -m patchrank.pretrain`: train a CLIP and save it where `load_clip` and open_clip find it.

Several processes: `torchrun --nproc-per-node 8 -m patchrank.pretrain ...`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from filelock import FileLock, Timeout

from patchrank import cli
from patchrank.atomic import write_json
from patchrank.errors import UserError
from patchrank.loading import save_clip
from patchrank.pretrain.boxes import encloses
from patchrank.pretrain.card import card, recipe_of
from patchrank.pretrain.config import PretrainConfig
from patchrank.pretrain.cost import as_lines, cost_table
from patchrank.pretrain.distributed import World, joined
from patchrank.pretrain.draws import sampler
from patchrank.pretrain.evaluate import check_pair, num_tested, open_checks
from patchrank.pretrain.loop import Run, check_run, open_run, state_path, train
from patchrank.pretrain.mask_pictures import draw_masks
from patchrank.pretrain.open_clip_export import save_open_clip
from patchrank.pretrain.pictures import normalise
from patchrank.pretrain.rules import check, notes
from patchrank.pretrain.threshold import as_line
from patchrank.provenance import command, versions

_NUM_SHOWN = 16


def main(config: PretrainConfig) -> None:
    """Train as `config` says, going on from the state in --out; then save the model and its test metrics."""
    check(config)
    torch.set_num_threads(config.threads)
    with joined(config.device) as world:
        check(config, world.size)
        with _alone(config, world):
            _main(config, world)


@contextmanager
def _alone(config: PretrainConfig, world: World) -> Iterator[None]:
    """Keep other runs out of --out while this one trains. Raises: UserError where another run is in it."""
    if config.dry_run or not world.leads:
        yield
        return
    config.out.mkdir(parents=True, exist_ok=True)
    if (config.out / "clip.json").exists() and not state_path(config.out).exists():
        raise UserError(f"--out {config.out}: holds a model without the state of its run; choose another --out")
    try:
        with FileLock(config.out / ".lock", timeout=0):
            for left in config.out.glob(".*.tmp"):  # of a run that was killed while it saved
                left.unlink()
            yield
    except Timeout:
        raise UserError(f"--out {config.out}: another process trains there; wait for it, or choose another") from None


def _main(config: PretrainConfig, world: World) -> None:
    run = open_run(config, world)
    config = run.config
    if world.leads:
        print(_cost_lines(run), flush=True)
    if config.dry_run:
        if world.leads:
            _show_masks(run)
        return
    if world.leads:
        origin = {"command": command("patchrank.pretrain"), "versions": versions()}
        write_json(config.out / "config.json", config.settings() | origin)
    train(run)
    if broken := run.batches.broken:
        write_json(config.out / f"broken-{world.rank}.json", broken)
        first = "; ".join(f"{name}: {why}" for name, why in list(broken.items())[:3])
        print(f"{len(broken)} broken in {config.data}, all in {config.out}/broken-{world.rank}.json: {first}")
    if world.leads:
        _save(run)


def _cost_lines(run: Run) -> str:
    config = run.config
    started = time.perf_counter()
    batch = run.batches.at(run.progress.step, 1.0)
    seconds = time.perf_counter() - started
    left, dataset = config.num_steps - run.progress.step, run.batches.dataset
    size = "a stream of pictures" if dataset is None else f"{len(dataset.images):,} pictures"
    per_process = config.batch_size // run.batches.num_parts
    said = [
        f"{config.recipe} on {config.data}: {size}, {left:,} of {config.num_steps:,} steps of {config.batch_size} to "
        f"go; drawing or reading {per_process} pictures takes {1000 * seconds:.0f} ms",
        *as_lines(cost_table(config), config.recipe),
        "GMAC/pair: billion multiply-accumulates (1 MAC = 2 FLOPs) of a training step for one picture and its caption; "
        "reported: the papers' time on their machines; x CLIP is what to expect here",
    ]
    if batch.teacher_box_B4 is not None:
        box_BV4, outer_B4 = batch.box_VB4.transpose(0, 1), batch.teacher_box_B4
        num_good = int(encloses(outer_B4, box_BV4).sum())
        share = float((box_BV4[..., 2:].prod(-1) / outer_B4[:, None, 2:].prod(-1)).mean())
        said.append(
            f"boxes: the teacher's holds all views of {num_good} of {len(outer_B4)} pictures; on average a "
            f"view covers {100 * share:.0f} % of it"
        )
    if any(view.mask.least is not None for view in config.row.views):
        said.append(as_line(config, batch))
    heads = {"simclr", "byol"} & set(config.row.terms)
    if heads and per_process < 16:
        said.append(f"note: the batch norms of {', '.join(sorted(heads))} see only {per_process} pictures at a time")
    return "\n".join(said + notes(config))


def _show_masks(run: Run) -> None:
    """Draw what the masks keep, with the towers as they are now."""
    batches, config = run.batches, run.config
    if batches.dataset is None or config.row.locked:
        return
    numbers = sampler(len(batches.dataset.images), min(_NUM_SHOWN, len(batches.dataset.images)), config.seed, 0)
    image_BCHW, good = batches.pictures.batch(numbers.tolist())
    texts = [batches.dataset.images[number].captions[0] for number in good]
    path, keep = config.out / "masks.png", _shown_keep(config)
    draw_masks(path, run.learner.to("cpu").eval(), normalise(image_BCHW, run.preprocess), texts, keep)
    print(
        f"what each masker keeps of {len(good)} pictures, with towers after step {run.progress.step} and "
        f"{100 * keep:.0f} % of the patches: {path}"
    )


def _shown_keep(config: PretrainConfig) -> float:
    """The share that the recipe's masks keep; half where it has none."""
    specs = [view.mask for view in config.row.views if view.mask.keep < 1.0]
    return (specs[0].mean_keep or specs[0].keep) if specs else 0.5


def _save(run: Run) -> None:
    config, pair = run.config, run.pair
    metrics = {config.eval_split: run.metrics or check_run(run)} if run.world.size == 1 else {}
    tests = open_checks(config, "test", run.preprocess)
    metrics["test"] = check_pair(pair, tests, run.preprocess, min(config.batch_size, 256), run.look)
    metrics = {split: found for split, found in metrics.items() if found}
    num_test = {name: num for pictures in tests for name, num in num_tested(pictures).items()}
    recipe = recipe_of(config, run.progress, metrics, num_test)
    name = config.name or f"{config.recipe}-{config.data}"
    save_clip(
        config.out,
        pair.tower if run.locked is None else run.locked.reference,
        pair.text,
        run.preprocess,
        pair.log_scale.exp().item(),
        name=name,
        recipe=recipe | {"card": card(recipe)},
    )
    print(card(recipe))
    print(f"model in {config.out}; use it with --model {config.out}")
    if not config.row.locked:
        save_open_clip(config.out / "open_clip", pair, run.preprocess)
        print(f"for open_clip: {config.out / 'open_clip'}")


if __name__ == "__main__":
    cli.run(main, PretrainConfig, prog="python -m patchrank.pretrain")
