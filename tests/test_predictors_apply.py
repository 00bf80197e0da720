"""`patchrank.apply(model, pruned=...)` and `scorer="salient"` inside models of every library."""

import copy

import pytest
import torch
from test_apply import KINDS, SPEC, Kind, gap
from torch import Tensor, nn

import patchrank
from patchrank.errors import UserError
from patchrank.pruned import PrunedTower
from patchrank.salient import Salient, share_macs
from patchrank.scorers import SCORERS
from patchrank.spec import PruneSpec
from predictors.readout import with_readout

HEADS = {
    "timm class token": lambda model, feature: model.head(feature),
    "timm mean": lambda model, feature: model.head(feature),
    "CLIPModel": lambda model, feature: model.visual_projection(feature),
    "CLIPVisionModelWithProjection": lambda model, feature: model.visual_projection(feature),
}
"""What a library's model does with our feature; the other kinds hand it out as it is."""
WHOLE_HEADS = ("SiglipModel", "SiglipVisionModel")
some_kinds = pytest.mark.parametrize(
    "name", ["open_clip CLIP", "open_clip SigLIP", "timm class token", "timm mean", "CLIPModel", "CLIPVisionModel"]
)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def pruned_for(kind: Kind, model: nn.Module) -> PrunedTower:
    tower = kind.adapter.tower(model).eval().requires_grad_(False)
    return PrunedTower(tower, SPEC, SCORERS["random"](tower.config.grid)).eval()


def recalibrated(pruned: PrunedTower) -> PrunedTower:
    """A copy whose norms and biases behind the first cut are moved."""
    other = copy.deepcopy(pruned)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in other.tower.named_parameters():
        if name.startswith(("blocks.2", "blocks.3", "norm.")) and parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return other


@some_kinds
def test_a_frozen_tower_does_what_its_spec_does(name: str, images: Tensor) -> None:
    kind = KINDS[name]
    model = kind.build()
    pruned = pruned_for(kind, model)
    applied = patchrank.apply(model, pruned=pruned)
    assert torch.equal(kind.feature(applied, images), kind.feature(patchrank.apply(model, spec=SPEC), images))
    assert not any(parameter.requires_grad for parameter in pruned.parameters())


@some_kinds
def test_a_calibrated_tower_brings_its_norms_and_biases(name: str, images: Tensor) -> None:
    kind = KINDS[name]
    model = kind.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruned = recalibrated(pruned_for(kind, model))
    applied = patchrank.apply(model, pruned=pruned)
    feature_BD = kind.feature(applied, images)
    head = HEADS.get(name, lambda model, feature: feature)
    assert gap(feature_BD, head(model, pruned(images))) < 1e-5
    assert gap(feature_BD, kind.feature(patchrank.apply(model, spec=SPEC), images)) > 1e-2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["open_clip CLIP", "timm class token"])
def test_a_readout_comes_along(name: str, images: Tensor) -> None:
    kind = KINDS[name]
    model = kind.build()
    pruned = pruned_for(kind, model)
    dim = pruned.config.feature_dim
    generator = torch.Generator().manual_seed(6)
    map_DD, offset_D = torch.randn(dim, dim, generator=generator), torch.randn(dim, generator=generator)
    other = with_readout(pruned, map_DD, offset_D)
    torch.testing.assert_close(other(images), pruned(images) @ map_DD.T + offset_D, rtol=1e-3, atol=1e-3)
    expected = HEADS.get(name, lambda model, feature: feature)(model, other(images))
    assert gap(kind.feature(patchrank.apply(model, pruned=other), images), expected) < 1e-5


@pytest.mark.parametrize("name", WHOLE_HEADS)
def test_siglip_of_hugging_face_pools_by_itself(name: str, images: Tensor) -> None:
    kind = KINDS[name]
    model = kind.build()
    pruned = pruned_for(kind, model)
    assert torch.equal(
        kind.feature(patchrank.apply(model, pruned=pruned), images),
        kind.feature(patchrank.apply(model, spec=SPEC), images),
    )
    with pytest.raises(UserError, match="pools by itself"):
        patchrank.apply(model, pruned=recalibrated(pruned))


def test_what_does_not_fit_is_refused() -> None:
    kind = KINDS["timm class token"]
    model = kind.build()
    pruned = pruned_for(kind, model)
    for argument in (dict(macs=0.7), dict(keep=0.5), dict(spec=SPEC), dict(rest="drop"), dict(scorer="random")):
        with pytest.raises(UserError, match=f"{next(iter(argument))} given beside pruned"):
            patchrank.apply(model, pruned=pruned, **argument)
    stranger = copy.deepcopy(pruned)
    stranger.tower.patch.weight.add_(1.0)
    with pytest.raises(UserError, match="trained for other weights"):
        patchrank.apply(model, pruned=stranger)
    vision = KINDS["CLIPVisionModel"].build()
    plain = pruned_for(KINDS["CLIPVisionModel"], vision)
    dim = plain.config.feature_dim
    with pytest.raises(UserError, match="has no projection to take a readout"):
        patchrank.apply(vision, pruned=with_readout(plain, torch.eye(dim), torch.zeros(dim)))


@pytest.mark.parametrize("name", ["open_clip CLIP", "timm mean", "timm attention", "SiglipVisionModel"])
def test_salient_covering_meets_its_budget(name: str, images: Tensor) -> None:
    kind = KINDS[name]
    model = kind.build()
    applied = patchrank.apply(model, macs=0.8, scorer="salient")
    pruned = next(module for module in applied.modules() if isinstance(module, PrunedTower))
    assert pruned.spec.select == "cover" and isinstance(pruned.scorer, Salient)
    assert pruned.scorer.has_class == (pruned.config.num_prefix > 0)
    assert gap(kind.feature(applied, images), kind.feature(model, images)) > 1e-3
    share = share_macs(pruned.config, pruned.spec) if pruned.scorer.has_class else 0
    cost = kind.adapter.cost(pruned.config, pruned.spec) + share
    assert cost <= 0.8 * kind.adapter.cost(pruned.config, PruneSpec(cuts=()))
