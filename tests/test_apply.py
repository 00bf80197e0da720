"""`patchrank.apply` on tiny random models of every library: same kind, same outputs, pruned, original untouched."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from test_loading_towers import TIMM_BASE, make_hf, shuffle
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import patchrank
from patchrank import PrunedTower, PruneSpec
from patchrank.adapters import hf_models, open_clip_models, timm_models
from patchrank.scorers import SCORERS
from patchrank.torchvision_shim import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: E402
import timm  # noqa: E402
from open_clip.timm_model import TimmModel  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

TEXT = {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 4, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 8, "mlp_ratio": 2.0}
SPEC = PruneSpec(cuts=((1, 0.75), (2, 0.5)), select="suppress")
TOKENS = torch.randint(3, 59, (3, 8), generator=torch.Generator().manual_seed(3))


def open_clip_model(**changes) -> nn.Module:
    model = shuffle(open_clip.CLIP(24, VISION | changes.pop("vision", {}), TEXT, **changes))
    open_clip.model.set_model_preprocess_cfg(model, {"mean": (0.5,) * 3, "std": (0.2,) * 3, "size": 32})
    return model


def timm_model(**changes) -> nn.Module:
    return shuffle(VisionTransformer(**(TIMM_BASE | {"depth": 4, "num_classes": 10} | changes)))


def open_clip_siglip() -> nn.Module:
    """CustomTextCLIP around a timm trunk with attention pooling, as open_clip's SigLIP models are."""

    def tiny(name: str, num_classes: int = 0, global_pool: str = "map", **_) -> nn.Module:
        return timm_model(num_classes=num_classes, global_pool=global_pool, class_token=False)

    model = open_clip.CustomTextCLIP(32, VISION, TEXT, init_logit_bias=-1.0)
    with mock.patch.object(timm, "create_model", tiny):
        model.visual = TimmModel("tiny", embed_dim=32, image_size=32, pool="map", proj="none")
    return shuffle(model)


@dataclass(frozen=True)
class Kind:
    """A kind of model: how to build one, what users read as its image feature, and its adapter."""

    build: Callable[[], nn.Module]
    feature: Callable[[nn.Module, Tensor], Tensor]
    adapter: object


def encode(model: nn.Module, image: Tensor) -> Tensor:
    return model.encode_image(image)


def pooled(model: nn.Module, image: Tensor) -> Tensor:
    return model(pixel_values=image).pooler_output


def hf_features(model: nn.Module, image: Tensor) -> Tensor:
    features = model.get_image_features(pixel_values=image)
    return getattr(features, "pooler_output", features)


KINDS = {
    "open_clip CLIP": Kind(open_clip_model, encode, open_clip_models),
    "open_clip CLIPA": Kind(
        lambda: open_clip_model(vision={"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}),
        encode,
        open_clip_models,
    ),
    "open_clip SigLIP": Kind(open_clip_siglip, encode, open_clip_models),
    "timm class token": Kind(timm_model, nn.Module.__call__, timm_models),
    "timm mean": Kind(lambda: timm_model(global_pool="avg", reg_tokens=2), nn.Module.__call__, timm_models),
    "timm attention": Kind(lambda: timm_model(global_pool="map", class_token=False), nn.Module.__call__, timm_models),
    "CLIPModel": Kind(lambda: make_hf("CLIPModel", num_hidden_layers=4), hf_features, hf_models),
    "CLIPVisionModel": Kind(lambda: make_hf("CLIPVisionModel", num_hidden_layers=4), pooled, hf_models),
    "CLIPVisionModelWithProjection": Kind(
        lambda: make_hf("CLIPVisionModelWithProjection", num_hidden_layers=4),
        lambda model, image: model(pixel_values=image).image_embeds,
        hf_models,
    ),
    "SiglipModel": Kind(lambda: make_hf("SiglipModel", num_hidden_layers=4), hf_features, hf_models),
    "SiglipVisionModel": Kind(lambda: make_hf("SiglipVisionModel", num_hidden_layers=4), pooled, hf_models),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def gap(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found - expected).abs().amax() / expected.abs().amax())


@every_kind
@pytest.mark.parametrize("training", [False, True])
def test_same_kind_and_the_original_is_untouched(kind: Kind, training: bool, images: Tensor) -> None:
    model = kind.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = kind.feature(model, images)
    model.train(training)
    applied = patchrank.apply(model, spec=SPEC)
    assert isinstance(applied, type(model)) and applied is not model
    assert {module.training for module in applied.modules()} == {training}
    assert {module.training for module in model.modules()} == {training}
    assert gap(kind.feature(applied.eval(), images), dense) > 1e-3, "nothing was pruned"
    for parameter in applied.parameters():
        parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(kind.feature(model.eval(), images), dense)


@every_kind
@pytest.mark.parametrize("rest", ["fold", "drop"])
def test_keeping_everything_changes_nothing(kind: Kind, rest: str, images: Tensor) -> None:
    model = kind.build()
    assert gap(kind.feature(patchrank.apply(model, keep=1.0, rest=rest), images), kind.feature(model, images)) < 1e-5
    whole = patchrank.apply(model, macs=1.0, rest=rest)
    assert gap(kind.feature(whole, images), kind.feature(model, images)) < 1e-5


def by_hand(kind: Kind, model: nn.Module, spec: PruneSpec, images: Tensor) -> Tensor:
    """The feature from a PrunedTower and the model's own last layers."""
    tower = kind.adapter.tower(model)
    feature_BD = PrunedTower(tower, spec, SCORERS["random"](tower.config.grid))(images)
    if isinstance(model, VisionTransformer):
        return model.head(feature_BD)
    projects = hasattr(model, "visual_projection")
    return model.visual_projection(feature_BD) if projects else feature_BD


@every_kind
@pytest.mark.parametrize("rest", ["fold", "drop"])
@pytest.mark.parametrize("where", ["before", "inside"])
def test_equals_the_pruned_tower_run_by_hand(kind: Kind, rest: str, where: str, images: Tensor) -> None:
    model = kind.build()
    spec = PruneSpec(cuts=SPEC.cuts, select="suppress", rest=rest, where=where)
    assert gap(kind.feature(patchrank.apply(model, spec=spec), images), by_hand(kind, model, spec, images)) < 1e-5


@every_kind
def test_images_of_a_batch_are_independent(kind: Kind, images: Tensor) -> None:
    applied = patchrank.apply(kind.build(), spec=SPEC)
    together = kind.feature(applied, images)
    alone = torch.cat([kind.feature(applied, image[None]) for image in images])
    assert gap(alone, together) < 1e-5


@every_kind
def test_copies_and_pickles(kind: Kind, images: Tensor) -> None:
    applied = patchrank.apply(kind.build(), spec=SPEC)
    buffer = io.BytesIO()
    torch.save(applied, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(applied), pickle.loads(pickle.dumps(applied)), loaded):
        assert type(twin) is type(applied)
        assert torch.equal(kind.feature(twin, images), kind.feature(applied, images))


@every_kind
@pytest.mark.parametrize("amount", [{"spec": SPEC}, {"keep": 0.5}], ids=["suppress", "default"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_preserved(kind: Kind, dtype: torch.dtype, amount: dict, images: Tensor) -> None:
    full = kind.feature(patchrank.apply(kind.build(), **amount), images)
    applied = patchrank.apply(kind.build().to(dtype), **amount)
    low = kind.feature(applied, images.to(dtype))
    assert low.dtype == dtype
    # A near tie may fall the other way in low precision, which changes the folding of a few tokens.
    assert torch.cosine_similarity(low.float(), full).min() > 0.98
    assert {value.dtype for name, value in applied.named_parameters() if "pruned" in name} == {dtype}


@every_kind
@pytest.mark.parametrize("amount", [{"spec": SPEC}, {"keep": 0.5}], ids=["suppress", "default"])
def test_autocast(kind: Kind, amount: dict, images: Tensor) -> None:
    applied = patchrank.apply(kind.build(), **amount)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = kind.feature(applied, images)
    assert torch.cosine_similarity(low.float(), kind.feature(applied, images)).min() > 0.98


@every_kind
def test_budget_is_what_the_model_really_computes(kind: Kind) -> None:
    """FLOPs of the image path on the meta device, in the library's own entry point, against the adapter's count."""
    model = kind.build()
    config, image = kind.adapter.tower(model).config, torch.empty(2, 3, 32, 32, device="meta")
    for spec in (PruneSpec(cuts=()), SPEC, PruneSpec(cuts=SPEC.cuts, rest="drop", select="topk")):
        applied = patchrank.apply(model, spec=spec).to("meta")
        with FlopCounterMode(display=False) as counter:
            kind.feature(applied, image)
        # The projection or classifier that stays in the library's own model; 1 MAC = 2 FLOP, 2 images.
        extra = 32 * 24 if hasattr(model, "visual_projection") else 0
        extra += 32 * 10 if isinstance(model, VisionTransformer) else 0
        assert counter.get_total_flops() == 2 * 2 * (kind.adapter.cost(config, spec) + extra)


def test_meta_models_are_applied_on_their_device() -> None:
    applied = patchrank.apply(open_clip_model().to("meta"), spec=SPEC)
    assert {value.device.type for value in [*applied.parameters(), *applied.buffers()]} == {"meta"}


def test_weights_of_the_image_tower_are_frozen_and_nothing_else() -> None:
    model = open_clip_model()
    applied = patchrank.apply(model, macs=0.9)
    assert all(value.requires_grad for value in model.parameters())
    assert not any(value.requires_grad for value in applied.visual.parameters())
    assert applied.token_embedding.weight.requires_grad


def test_scorer_by_name_callable_or_module(images: Tensor) -> None:
    model = open_clip_model()
    default = patchrank.apply(model, keep=0.5).encode_image(images)
    assert torch.equal(patchrank.apply(model, keep=0.5, scorer="salient").encode_image(images), default)
    assert gap(patchrank.apply(model, keep=0.5, scorer="random").encode_image(images), default) > 1e-3
    assert gap(patchrank.apply(model, keep=0.5, scorer="token-norm").encode_image(images), default) > 1e-3
    own = patchrank.apply(model, keep=0.5, scorer=lambda state: state.patches_BNC[..., 0])
    assert gap(own.encode_image(images), default) > 1e-3
    scorer = SCORERS["centre"]((4, 4))
    applied = patchrank.apply(model, keep=0.5, scorer=scorer)
    scorer.score_G.zero_()
    expected = patchrank.apply(model, keep=0.5, scorer="centre").encode_image(images)
    assert torch.equal(applied.encode_image(images), expected), "the copy must not share the given module"
