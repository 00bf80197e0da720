"""The graphs that `export.bench` measures: dense, and pruned in several manners at equal MACs, written once."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from export.bench_config import BenchConfig
from export.onnx_file import write_graphs
from export.publish import publish, read_manifest, staging
from export.serving import ServingGraph
from export.tracing import trace
from patchrank.errors import UserError
from patchrank.loading import load_clip
from patchrank.macs import dense_macs, pruned_macs
from patchrank.preprocess import Preprocess
from patchrank.presets import one_cut, spec_for_macs
from patchrank.pruned import PrunedTower, Scorer
from patchrank.salient import SALIENT, Salient, default_scorer, salient_cost, salient_preset
from patchrank.scorers import SCORERS
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig, VisionTower

_CLIP = dict(patch_size=16, width=768, num_layers=12, num_heads=12, mlp_width=3072, pre_norm=True, output_dim=512)
_LARGE = dict(_CLIP, patch_size=14, width=1024, num_layers=24, num_heads=16, mlp_width=4096, output_dim=768)
SHAPES: dict[str, TowerConfig] = {
    "ViT-B-16": TowerConfig(image_size=(224, 224), **_CLIP),
    "ViT-B-32": TowerConfig(image_size=(224, 224), **dict(_CLIP, patch_size=32)),
    "ViT-L-14": TowerConfig(image_size=(224, 224), **_LARGE),
    "ViT-L-14-336": TowerConfig(image_size=(336, 336), **_LARGE),
}
"""Towers with random weights: speed does not depend on the values."""


@dataclass(frozen=True)
class Entry:
    """One graph under measurement."""

    variant: str
    precision: str
    spec: PruneSpec
    keep: float
    macs: int
    dense: int
    path: Path


def load_tower(config: BenchConfig) -> VisionTower:
    """The tower of --model, or a shape with seeded random weights."""
    if config.model not in SHAPES or config.pretrained:
        return load_clip(config.model, config.pretrained).tower
    torch.manual_seed(config.seed)
    tower = VisionTower(SHAPES[config.model]).eval().requires_grad_(False)
    for block in tower.blocks:
        torch.nn.init.normal_(block.qkv.weight, std=0.02)
    return tower


def specs_of(config: BenchConfig, tower: TowerConfig) -> list[tuple[str, float, PruneSpec]]:
    """(variant, keep, spec): dense first, then per keep what --variants names, all at the MACs of fold-1 or below.

    Folding selects as `patchrank.apply` does, dropping as the papers do, by scores that cost nothing.
    """
    found = [("dense", 1.0, PruneSpec(cuts=()))]
    for keep in config.keep:
        fold = one_cut(tower, keep, layer=config.layer)
        fold = replace(fold, select="cover") if default_scorer(tower) == SALIENT else fold
        build = {
            "drop-1": lambda fold=fold: replace(fold, rest="drop", select="topk"),
            "fold-1": lambda fold=fold: fold,
            "fold-4": lambda fold=fold: four_cuts(tower, fold),
            "accurate": lambda fold=fold: _accurate(tower, fold),
        }
        found += [(variant, keep, build[variant]()) for variant in config.variants]
    return found


def scorer_of(tower: TowerConfig, spec: PruneSpec, seed: int) -> Scorer:
    """What ranks the patches of a spec."""
    if spec.select == "cover":
        return Salient(tower.num_prefix > 0)
    return SCORERS["random"](tower.grid, seed=seed)


def macs_of(tower: TowerConfig, spec: PruneSpec) -> int:
    """MACs of an image, its scorer counted."""
    return salient_cost(pruned_macs, spec.select == "cover")(tower, spec)


def _accurate(tower: TowerConfig, like: PruneSpec) -> PruneSpec:
    share = macs_of(tower, like) / dense_macs(tower)
    return salient_preset(spec_for_macs, tower, share) if like.select == "cover" else spec_for_macs(tower, share)


def four_cuts(tower: TowerConfig, like: PruneSpec) -> PruneSpec:
    """The one-cut spec `like` with four equal cuts, two blocks apart from its layer on, at no more MACs than it.

    Source: the schedule of Patch Ranking (layers 3, 5, 7, 9), with our fold.
    """
    num_patches, first = tower.num_patches, like.cuts[0][0]
    layers = [layer for layer in range(first, first + 8, 2) if layer < tower.num_layers]
    for K in range(num_patches - len(layers), len(layers), -1):
        step = (num_patches - K) / len(layers)
        counts = [round(num_patches - step * number) for number in range(1, len(layers) + 1)]
        spec = replace(like, cuts=tuple((layer, count / num_patches) for layer, count in zip(layers, counts)))
        if macs_of(tower, spec) <= macs_of(tower, like):
            return spec
    return like


def graph_of(tower: VisionTower, spec: PruneSpec, seed: int) -> ServingGraph:
    """Serving graph without classes."""
    size = tower.config.image_size
    preprocess = Preprocess(image_size=size, resize=max(size), mean=(0.5,) * 3, std=(0.5,) * 3)
    return ServingGraph(PrunedTower(tower, spec, scorer_of(tower.config, spec, seed)), preprocess).eval()


def traced(graph: ServingGraph, opset: int):
    """Its ONNX form."""
    return trace(graph, graph.example(), graph.input_name, graph.output_names, opset)


def folder_of(config: BenchConfig) -> Path:
    """Where the graphs of this model lie."""
    return config.graphs / Path(config.model).name


def entries(config: BenchConfig, tower: VisionTower) -> list[Entry]:
    """All graphs, in the order of precisions and specs; those that are missing on disk are written first.

    Raises: UserError where the folder holds graphs of the same name made otherwise.
    """
    folder, specs = folder_of(config), specs_of(config, tower.config)
    names = [variant if keep == 1.0 else f"{variant}-{keep:g}" for variant, keep, _ in specs]
    found = []
    for precision in config.precision:
        kind = f"{precision}-{config.opset}"
        made = read_manifest(folder / f"{kind}.json").get("made_of", {})
        wanted = {"seed": config.seed, "pretrained": Path(config.pretrained).name}
        wanted |= {"specs": json.loads(json.dumps({name: spec.to_dict() for name, (_, _, spec) in zip(names, specs)}))}
        there = {name: made.get("specs", {}).get(name) for name in names}
        if {**made, "specs": there} != wanted:
            _write(folder, kind, precision, wanted, config, tower, dict(zip(names, [spec for _, _, spec in specs])))
        for name, (variant, keep, spec) in zip(names, specs):
            macs, dense = macs_of(tower.config, spec), dense_macs(tower.config)
            found.append(Entry(variant, precision, spec, keep, macs, dense, folder / f"{name}-{kind}.onnx"))
    missing = [entry.path for entry in found if not entry.path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: missing; remove --graphs {config.graphs} and run the command again")
    return found


def _write(folder: Path, kind: str, precision: str, wanted: dict, config: BenchConfig, tower, specs) -> None:
    """Trace and write all graphs of one precision with one weights file."""
    with staging(folder) as staged, torch.no_grad():
        models = {f"{name}": traced(graph_of(tower, spec, config.seed), config.opset) for name, spec in specs.items()}
        (weights, *paths), _ = write_graphs(staged, models, precision, f"weights-{config.opset}")
        records = []
        for name, path in zip(specs, paths):
            path.rename(staged / f"{name}-{kind}.onnx")
            records.append({"files": [weights.name, f"{name}-{kind}.onnx"]})
        publish(staged, folder, {"made_of": wanted, "models": records}, f"{kind}.json")
