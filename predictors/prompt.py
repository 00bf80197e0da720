"""`python -m predictors.prompt`: the paper's prompt tuning (16 shots a class), dense and pruned, as its Table 5.

Six rows: untuned, text tokens, text and visual tokens, each dense and pruned; tuned rows once per seed.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from patchrank import cli
from patchrank.atomic import write_json, write_tensors, write_text
from patchrank.data import CATALOG, Dataset, batches, few_shot, load_dataset
from patchrank.errors import UserError
from patchrank.loading import LoadedClip, class_matrix, load_clip
from patchrank.macs import dense_macs
from patchrank.provenance import command, machine, versions
from patchrank.pruned import PrunedTower
from patchrank.scorers import SCORERS
from patchrank.search.plan import threads
from patchrank.search.runner import spread
from patchrank.spec import RESTS
from patchrank.tower import VisionTower
from predictors.artifact import load_pruned, read_training
from predictors.cache import part
from predictors.costs import learned_macs
from predictors.fit import Course
from predictors.prepare import asked_spec
from predictors.prompt_fit import Prune, Setting, Shots, hits_of, train, tuned
from predictors.prompt_table import CELLS, Cell, PromptRow, as_dicts, make_row, markdown
from predictors.prompt_text import PromptedClasses
from predictors.prompt_tower import Prompt


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Tune text tokens, and visual tokens tied to them, on a few labelled images a class; dense and pruned."""

    model: str = "embedded"
    """Open_clip name, folder, or "embedded": the small model in the package; it needs a text tower."""
    pretrained: str = ""
    """Open_clip tag or checkpoint file of --model."""
    data: str = "digits"
    """Data set with classes: a row of the catalog."""
    data_root: Path | None = None
    """Folder that holds the data sets; without it $PATCHRANK_ASSETS/data."""
    shots: int = 16
    """Labelled train images of each class, drawn as CoOp draws them."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One draw and one training of each row per seed."""
    limit: int | None = 300
    """Test images, spread over the classes. None: all."""
    num_tokens: int = 16
    """Learned text tokens; as many visual ones."""
    macs: float | None = None
    """Budget of the pruned rows: share of the dense image tower's MACs, before visual tokens. Default 0.7."""
    keep: float | None = None
    """Instead of --macs: share of the patches that one cut leaves."""
    cuts: str | None = None
    """Instead of --macs: layer:count or layer:ratio of each cut; the paper's are 3:176,5:156,7:136,9:116."""
    layer: int | None = None
    """Blocks that run before the one cut of --keep; without it a quarter of the depth."""
    rest: str = "fold"
    """What becomes of the patches that are not kept: "fold" or "drop" (the paper)."""
    pruned: Path | None = None
    """Instead of all these: folder that `predictors.train` wrote, for its scorer and cuts."""
    num_steps: int = 60
    """Steps of each training."""
    batch_size: int = 16
    """Images per step."""
    save_every: int = 30
    """Steps between looks at all shots, each with a state on disk: what a kill can cost."""
    lr: float = 2e-3
    """Peak learning rate."""
    device: str = "cpu"
    """Where to compute: cpu or cuda."""
    threads: int | None = None
    """CPU threads; without it torch's default."""
    out: Path = Path("out/prompt")
    """Folder of the prompts, prompt.json and prompt.md; the same command goes on after a kill."""


def check(config: PromptConfig) -> None:
    """Check all that needs neither model nor data. Raises: UserError."""
    if config.data not in CATALOG:
        raise UserError(f"--data {config.data}: unknown; choose one of {', '.join(CATALOG)}")
    if config.rest not in RESTS:
        raise UserError(f"--rest {config.rest}: unknown; choose one of {', '.join(RESTS)}")
    for name in ("shots", "num_tokens", "num_steps", "batch_size", "save_every", "limit"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        raise UserError(f"--seeds {' '.join(map(str, config.seeds))}: must be one or more different numbers")
    if not config.lr > 0:
        raise UserError(f"--lr {config.lr:g}: must be positive")
    if config.pruned is not None and (config.macs, config.keep, config.cuts, config.layer) != (None,) * 4:
        raise UserError(f"--pruned {config.pruned}: brings its own cuts; leave --macs, --keep, --cuts and --layer out")


def main(config: PromptConfig) -> None:
    """Tune every row for every seed, or go on with what is in --out; print the table."""
    check(config)
    with threads(config.threads):
        report = tune(config, load_clip(config.model, config.pretrained, config.device), quiet=False)
    print(report["table"])
    print(f"prompt.json, prompt.md and the prompts in {config.out}")


def tune(config: PromptConfig, clip: LoadedClip, *, quiet: bool = True) -> dict[str, Any]:
    """All six rows; writes the prompts, prompt.json and prompt.md into --out; returns the report.

    Raises: UserError for a model without text tower, a data set without classes, or flags that do not fit them.
    """
    train_set, test_set = (load_dataset(config.data, root=config.data_root, split=s) for s in ("train", "test"))
    prune = pruning(config, clip)
    classes = PromptedClasses(clip, test_set.class_names, test_set.templates[0], config.num_tokens).to(config.device)
    setting = Setting(
        tower=clip.tower,
        classes=classes,
        logit_scale=clip.text.logit_scale,
        course=Course.of(config),
        batch_size=config.batch_size,
    )
    test = in_memory(part(test_set, spread(test_set.images, config.limit)), clip, config)
    found: dict[str, list[Tensor]] = {}
    macs: dict[str, int] = {}
    class_YD = class_matrix(clip, test_set)[0].T
    for cell in CELLS[:2]:
        module = _prune(cell, prune)(clip.tower)
        found[cell.name], macs[cell.name] = [hits_of(module, class_YD, test, config.batch_size)], macs_of(module)
    settings, form = (
        _settings(config) | {"weights_hash": clip.weights_hash},
        "{desc}: {n_fmt}/{total_fmt} {remaining} left",
    )
    with tqdm(total=4 * len(config.seeds), desc="prompts", bar_format=form, disable=quiet) as bar:
        for seed in config.seeds:
            shots = in_memory(few_shot(train_set, config.shots, seed), clip, config)
            for cell in CELLS[2:]:
                folder = config.out / f"seed_{seed}" / "_".join(re.findall("[a-z]+", cell.name))
                prompt = train(setting, cell, _prune(cell, prune), shots, seed, folder, settings)
                save(folder / "prompt.safetensors", prompt, clip.weights_hash)
                module = tuned(setting, _prune(cell, prune), prompt)
                with torch.no_grad():
                    tuned_YD = classes(prompt.text_TE)
                found.setdefault(cell.name, []).append(hits_of(module, tuned_YD, test, config.batch_size))
                macs[cell.name] = macs_of(module)
                bar.update()
    return _report(config, clip, found, macs, len(test.label_I))


def _prune(cell: Cell, prune: Prune) -> Prune:
    return prune if cell.pruned else lambda tower: tower


def pruning(config: PromptConfig, clip: LoadedClip) -> Prune:
    """What the pruned rows do to a tower: a saved scorer's cuts, or the cuts of the flags with random priorities."""
    if config.pruned is not None:
        source = read_training(config.pruned)
        if source["source_weights_hash"] != clip.weights_hash or source["mode"] != "frozen":
            raise UserError(
                f"--pruned {config.pruned}: is {source['mode']}, for weights {source['source_weights_hash'][:12]}; "
                f"must be frozen, for the weights {clip.weights_hash[:12]} of the model"
            )
        found = load_pruned(config.pruned, config.device)
        return lambda tower: PrunedTower(tower, found.spec, found.scorer, found.added, found.metric).eval()
    spec = asked_spec(config, clip.tower.config)
    scorer = SCORERS["random"](clip.tower.config.grid)
    return lambda tower: PrunedTower(tower, spec, scorer).eval()


def macs_of(module: VisionTower | PrunedTower) -> int:
    """Image MACs, visual tokens, scorer and added tokens included."""
    if isinstance(module, VisionTower):
        return dense_macs(module.config)
    return learned_macs(module.config, module.spec, module.scorer, module.added)


def in_memory(dataset: Dataset, clip: LoadedClip, config: PromptConfig) -> Shots:
    """All pictures that can be read, with their labels. Raises: UserError if there is none."""
    images, labels = [], []
    for _, image_BCHW, label_B in batches(dataset, clip.preprocess, config.batch_size):
        images.append(image_BCHW.to(config.device))
        labels.append(label_B.to(config.device))
    if not images:
        raise UserError(f"{dataset.name}: none of its {len(dataset.images)} pictures can be read; check --data-root")
    return Shots(torch.cat(images), torch.cat(labels))


def save(path: Path, prompt: Prompt, weights_hash: str) -> None:
    """P_t (T, E) as "text" and, where there is one, M (C, E) as "map"."""
    tensors = {"text": prompt.text_TE} | ({} if prompt.map_CE is None else {"map": prompt.map_CE})
    write_tensors(path, tensors, {"weights_hash": weights_hash})


def _settings(config: PromptConfig) -> dict[str, Any]:
    free = ("out", "data_root", "device", "seeds", "limit")
    values = {name: value for name, value in asdict(config).items() if name not in free}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _report(
    config: PromptConfig, clip: LoadedClip, found: dict[str, list[Tensor]], macs: dict[str, int], num_images: int
) -> dict[str, Any]:
    hit = {name: torch.stack(parts).cpu() for name, parts in found.items()}
    dense = dense_macs(clip.tower.config)
    rows: list[PromptRow] = []
    for cell in CELLS:
        twin = hit[Cell(text=cell.text, visual=cell.visual, pruned=False).name] if cell.pruned else None
        rows.append(make_row(cell, hit[cell.name], macs[cell.name], dense, twin))
    origin = {"command": command("predictors.prompt"), "versions": versions(), "machine": machine()}
    report = origin | {
        "settings": _settings(config) | {"seeds": list(config.seeds), "limit": config.limit},
        "weights_hash": clip.weights_hash,
        "num_images": num_images,
        "dense_image_macs": dense,
        "rows": as_dicts(rows),
    }
    write_json(config.out / "prompt.json", report)
    title = f"{config.data}, {num_images} test images, {config.shots} shots a class, {len(config.seeds)} seeds"
    table = markdown(rows, title)
    write_text(config.out / "prompt.md", f"`{origin['command']}`\n\n{table}\n")
    return report | {"table": table}


if __name__ == "__main__":
    cli.run(main, PromptConfig, prog="python -m predictors.prompt")
