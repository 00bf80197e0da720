"""torch.compile without a graph break, and torch.export with a free batch size."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from conftest import make_tower
from test_apply import SPEC, Kind, every_kind, gap, timm_model
from torch import Tensor

import patchrank
from patchrank.pruned import PrunedTower
from patchrank.scorers import SCORERS
from patchrank.spec import PruneSpec


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@every_kind
def test_applied_models_compile_whole(kind: Kind, images: Tensor) -> None:
    applied = patchrank.apply(kind.build(), spec=SPEC)
    compiled = torch.compile(lambda image: kind.feature(applied, image), fullgraph=True, backend="eager")
    assert gap(compiled(images), kind.feature(applied, images)) < 1e-5


@pytest.mark.parametrize("rest", ["fold", "drop"])
def test_timm_features_compile_whole(rest: str, images: Tensor) -> None:
    applied = patchrank.apply(timm_model(), keep=0.5, rest=rest)
    compiled = torch.compile(applied.forward_features, fullgraph=True, backend="eager")
    assert gap(compiled(images), applied.forward_features(images)) < 1e-5


def pruned_tower(scorer: str = "random", **changes) -> PrunedTower:
    spec = PruneSpec(**(dict(cuts=((0, 0.75), (1, 0.5)), select="suppress") | changes))
    return PrunedTower(make_tower(num_layers=2), spec, SCORERS[scorer]((4, 4)))


@pytest.mark.parametrize("scorer", SCORERS)
def test_pruned_tower_compiles_whole_with_every_scorer(scorer: str, images: Tensor) -> None:
    pruned = pruned_tower(scorer, cuts=((1, 0.5),))
    compiled = torch.compile(pruned, fullgraph=True, backend="eager")
    assert gap(compiled(images), pruned(images)) < 1e-5


def test_one_compilation_serves_every_batch_size(images: Tensor) -> None:
    pruned = pruned_tower(where="inside")
    compiled = torch.compile(pruned, fullgraph=True, backend="eager", dynamic=True)
    # Not 3 at first: the compiler takes equal sizes for one size, and there are 3 channels.
    more = torch.cat([images, images[:2]])
    assert gap(compiled(more), pruned(more)) < 1e-5
    with torch.compiler.set_stance("fail_on_recompile"):
        assert gap(compiled(images), pruned(images)) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"where": "inside"},
        {"merge_norm": "mean", "select": "topk"},
        {"rest": "drop", "select": "topk"},
        {"rest": "drop", "where": "inside"},
    ],
    ids=str,
)
def test_pruned_tower_exports_with_a_free_batch(changes: dict) -> None:
    pruned = pruned_tower(**changes)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(pruned, (torch.zeros(2, 3, 32, 32),), dynamic_shapes={"image_BCHW": {0: batch}})
    for num_images in (1, 2, 5):
        image_BCHW = torch.randn(num_images, 3, 32, 32, generator=torch.Generator().manual_seed(num_images))
        assert gap(program.module()(image_BCHW), pruned(image_BCHW)) < 1e-5


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.timeout(600)
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="a C++ compiler is absent")
def test_inductor(images: Tensor) -> None:
    applied = patchrank.apply(timm_model(depth=2), keep=0.5)
    compiled = torch.compile(applied, fullgraph=True)
    assert gap(compiled(images), applied(images)) < 1e-5
