"""From a config to what is exported: the model, one pruned tower per variant, the class list, the comparison's images.

Letters: B batch, H rows, W columns.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.config import ExportConfig
from export.serving import Classes, ServingGraph
from patchrank.data import BrokenImage, Dataset, load_dataset
from patchrank.errors import UserError
from patchrank.loading import LoadedClip, class_matrix
from patchrank.macs import pruned_macs
from patchrank.preprocess import Preprocess
from patchrank.presets import resolve_spec
from patchrank.pruned import PrunedTower, Scorer
from patchrank.salient import SALIENT, Salient, default_scorer, salient_cost
from patchrank.scorers import SCORERS
from patchrank.search.runner import spread
from patchrank.spec import PruneSpec, parse_cuts
from patchrank.tower import TowerConfig
from predictors.artifact import load_pruned


@dataclass(frozen=True)
class Variant:
    """One graph to be."""

    name: str
    graph: ServingGraph


@dataclass(frozen=True)
class Pictures:
    """Images at the model's size."""

    ids: list[str]
    image_BHW3: Tensor
    """uint8 (B, H, W, 3)."""
    label_B: Tensor | None = None
    """Index into `class_names`, int64; None where the data set has no labels."""
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class _ClassList:
    """What `class_matrix` asks of a data set."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


def pixels(preprocess: Preprocess) -> Preprocess:
    """The same resize and crop without normalisation: values k / 255."""
    return replace(preprocess, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def load_pictures(
    dataset: Dataset, preprocess: Preprocess, limit: int, source: tuple[int, int] | None = None
) -> Pictures:
    """Images of a data set, spread over its classes; broken ones are left out. Raises: UserError if none is left.

    Args: source, rows and columns of what a graph takes that resizes itself; without it the model's size.
    """
    if source is not None:
        preprocess = replace(preprocess, image_size=source, resize=source, mode="shortest")
    transform, ids, images, labels = pixels(preprocess), [], [], []
    for item in spread(dataset.images, limit):
        try:
            picture = transform(dataset.open(item.id))
        except BrokenImage:
            continue
        ids.append(item.id)
        images.append((picture * 255).round().to(torch.uint8).permute(1, 2, 0))
        labels.append(item.label)
    if not images:
        raise UserError(f"--data {dataset.name}: no image could be read; nothing is published without a comparison")
    label_B = None if None in labels else torch.tensor(labels)
    return Pictures(ids, torch.stack(images), label_B, tuple(dataset.class_names))


def _specs(config: ExportConfig, tower: TowerConfig) -> dict[str, PruneSpec]:
    """Variant name -> spec, of what the config asks for; empty if it leaves that to a saved tower."""
    if config.cuts:
        cuts = parse_cuts(config.cuts, tower.num_patches)
        name = "cuts-" + config.cuts.replace(":", "x").replace(",", "-")
        return {name: _resolve(config, tower, cuts=cuts)}
    if config.keep:
        return {f"keep-{keep:g}": _keep_spec(config, tower, keep) for keep in config.keep}
    macs = config.macs or (() if config.pruned else (0.7,))
    return {f"macs-{share:g}": _resolve(config, tower, macs=share) for share in macs}


def _keep_spec(config: ExportConfig, tower: TowerConfig, keep: float) -> PruneSpec:
    if keep == 1.0:
        return PruneSpec(cuts=(), rest=config.rest)
    return _resolve(config, tower, keep=keep, layer=config.layer)


def _resolve(config: ExportConfig, tower: TowerConfig, **amount) -> PruneSpec:
    """The spec of one variant, selecting in the manner that goes with --scorer."""
    if _scorer_name(config, tower) != SALIENT:
        return resolve_spec(tower, rest=config.rest, **amount)
    cost = salient_cost(pruned_macs, tower.num_prefix > 0)
    return replace(resolve_spec(tower, rest=config.rest, cost=cost, **amount), select="cover")


def _without_output(tower: TowerConfig) -> TowerConfig:
    """The architecture but for the projection, which a calibration with a readout replaces."""
    return replace(tower, output_dim=None, output_bias=False)


def _scorer_name(config: ExportConfig, tower: TowerConfig) -> str:
    return default_scorer(tower) if config.scorer is None else config.scorer


def _scorer(config: ExportConfig, tower: TowerConfig) -> Scorer:
    """What --scorer names. Raises: UserError for an unknown name."""
    name = _scorer_name(config, tower)
    if name == SALIENT:
        return Salient(tower.num_prefix > 0)
    if name not in SCORERS:
        raise UserError(f"--scorer {name}: unknown; choose one of {', '.join((*SCORERS, SALIENT))}")
    return SCORERS[name](tower.grid, seed=config.seed)


def pruned_towers(config: ExportConfig, clip: LoadedClip) -> dict[str, PrunedTower]:
    """Variant name -> pruned tower; all variants share the tower's weights."""
    specs = _specs(config, clip.tower.config)
    if config.pruned is not None:
        saved = load_pruned(config.pruned)
        if _without_output(saved.config) != _without_output(clip.tower.config):
            raise UserError(f"--pruned {config.pruned}: was made of another architecture than --model {config.model}")
        # Its scorer was trained for its own manner of selecting and folding; only the cuts may change.
        own = {name: replace(saved.spec, cuts=spec.cuts) for name, spec in specs.items()}
        own = own or {config.pruned.resolve().name: saved.spec}
        parts = saved.tower, saved.scorer, saved.added, saved.metric
    else:
        own, parts = specs, (clip.tower, _scorer(config, clip.tower.config), None, None)
    tower, scorer, added, metric = parts
    return {name: PrunedTower(tower, spec, scorer, added, metric).eval() for name, spec in own.items()}


def class_list(config: ExportConfig, clip: LoadedClip, dataset: Dataset) -> tuple[Classes | None, str]:
    """Classes to bake in, and a note where --classes data cannot be followed.

    Raises: UserError for a file that cannot be read, or where it cannot be compared with this model.
    """
    if config.classes == "none":
        return None, ""
    if config.classes == "data":
        try:
            return _classes(clip, dataset), ""
        except UserError as error:
            return None, f"no class list in the graph: {error}"
    try:
        lines = Path(config.classes).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {config.classes}: cannot be read ({error}); give data, none or a file") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names or config.template.count("{}") != 1:
        raise UserError(f"--classes {config.classes} --template {config.template!r}: needs names and one {{}}")
    return _classes(clip, _ClassList(Path(config.classes).name, names, (config.template,))), ""


def _classes(clip: LoadedClip, dataset: Dataset | _ClassList) -> Classes:
    weight_DY, bias_Y = class_matrix(clip, dataset)
    text = clip.class_head is None
    return Classes(
        names=tuple(dataset.class_names),
        weight_DY=weight_DY.cpu(),
        bias_Y=None if bias_Y is None else bias_Y.cpu(),
        scale=clip.text.logit_scale if text else 1.0,
        unit_features=text,
    )


def load_images(config: ExportConfig, preprocess: Preprocess) -> tuple[Dataset, Pictures]:
    """The data set of the comparison and its images."""
    dataset = load_dataset(config.data, root=config.data_root, split=config.split)
    return dataset, load_pictures(dataset, preprocess, config.images, config.source)


def calibration_images(config: ExportConfig, preprocess: Preprocess) -> Pictures | None:
    """Images that int8 is measured on; none of the comparison's where there is a choice."""
    if not {"int8", "int8-static"} & set(config.precision):
        return None
    try:
        dataset = load_dataset(config.data, root=config.data_root, split="train")
    except UserError:
        dataset = load_dataset(config.data, root=config.data_root, split=config.split)
    return load_pictures(dataset, preprocess, config.calibration, config.source)


def variants(config: ExportConfig, clip: LoadedClip, dataset: Dataset) -> tuple[list[Variant], str]:
    """Everything to export, and a note for the reader."""
    classes, note = class_list(config, clip, dataset)
    towers = pruned_towers(config, clip).items()
    graphs = {name: ServingGraph(pruned, clip.preprocess, classes, config.source) for name, pruned in towers}
    return [Variant(name, graph.eval()) for name, graph in graphs.items()], note


def as_numpy(image_BHW3: Tensor) -> np.ndarray:
    """What a runtime is fed."""
    return np.ascontiguousarray(image_BHW3.numpy())
