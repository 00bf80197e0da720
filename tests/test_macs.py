"""macs.py: closed forms against PyTorch's own counter on the meta device, and the published sizes."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from patchrank.macs import dense_macs, pruned_macs
from patchrank.pruned import PrunedTower
from patchrank.search.variants import prefix_macs, prepare, variant_macs
from patchrank.spec import MERGE_NORMS, RESTS, SELECTS, WHERES, PruneSpec
from patchrank.tower import TowerConfig, VisionTower

B16 = TowerConfig(
    image_size=(224, 224), patch_size=16, width=768, num_layers=12, num_heads=12, mlp_width=3072, output_dim=512
)
SMALL = dict(image_size=(40, 48), patch_size=8, width=24, num_layers=4, num_heads=3, mlp_width=40)
KINDS = {
    "class": dict(output_dim=20),
    "class, no projection, registers": dict(num_prefix=5),
    "mean": dict(pool="mean", num_prefix=0, norm="after_pool"),
    "attention": dict(pool="attention", num_prefix=0),
}
CUTS = (((0, 0.5),), ((3, 0.6),), ((1, 0.8), (2, 0.5), (3, 0.2)))


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def meta_tower(kind: str) -> VisionTower:
    with torch.device("meta"):
        return VisionTower(TowerConfig(**SMALL, **KINDS[kind])).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_equals_the_counter(kind: str) -> None:
    tower = meta_tower(kind)
    image = torch.empty(1, 3, 40, 48, device="meta")
    assert dense_macs(tower.config) == counted(lambda: tower(image))
    in_full = counted(lambda: tower.head(tower.run(tower.embed(image), 0, 4)))
    assert dense_macs(tower.config, class_row_only=False) == in_full


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", CUTS)
def test_pruned_equals_the_counter(kind: str, cuts) -> None:
    tower = meta_tower(kind)
    image = torch.empty(1, 3, 40, 48, device="meta")
    for where, rest, select, norm in itertools.product(WHERES, RESTS, SELECTS, MERGE_NORMS):
        spec = PruneSpec(cuts=cuts, where=where, rest=rest, select=select, merge_norm=norm)
        pruned = PrunedTower(tower, spec, lambda state: state.patches_BNC.sum(-1))
        assert pruned_macs(tower.config, spec) == counted(lambda pruned=pruned: pruned(image)), spec


class Added(torch.nn.Module):
    """Two compensation tokens that cost nothing."""

    def forward(self, state, score_BN, K):
        return state.x_BLC[:, :2]


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_and_the_scorer_are_counted(kind: str) -> None:
    tower = meta_tower(kind)
    image = torch.empty(1, 3, 40, 48, device="meta")
    with torch.device("meta"):
        scorer = torch.nn.Linear(24, 1)
    spec = PruneSpec(cuts=((1, 0.8), (3, 0.5)), num_added=2)
    prefix = tower.config.num_prefix
    scored = 24 * (30 + 24)
    pruned = PrunedTower(tower, spec, lambda state: scorer(state.patches_BNC).squeeze(-1), Added())
    if prefix >= 2:
        assert pruned_macs(tower.config, spec, scorer=scored) == counted(lambda: pruned(image))
    else:  # the stand-in needs two tokens to hand over
        pruned.added.forward = lambda state, score_BN, K: state.patches_BNC[:, :2]
        assert pruned_macs(tower.config, spec, scorer=scored) == counted(lambda: pruned(image))


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_searchs_counter_equals_the_counter(kind: str, rest: str) -> None:
    tower = meta_tower(kind)
    spec = PruneSpec(cuts=((2, 1.0),), rest=rest)
    image_CHW = torch.empty(3, 40, 48, device="meta")
    made = []
    assert counted(lambda: made.append(prepare(tower, image_CHW, spec, 3))) == prefix_macs(tower, spec)
    order_VN = torch.arange(30, device="meta").expand(3, -1)
    assert counted(lambda: made[0]._chunk(order_VN, 11)) == 3 * variant_macs(tower, spec, 30, 11)


def test_vit_b16_sizes_of_the_design() -> None:
    """GMAC of the dense tower, one cut of 40 % at layer 3, and four cuts of 20 tokens; then with the class row only."""
    one = PruneSpec(cuts=((3, 0.6),), rest="drop")
    schedule = PruneSpec(
        cuts=tuple((layer, K / 196) for layer, K in ((3, 176), (5, 156), (7, 136), (9, 116))), rest="drop"
    )
    for class_row_only, expected in ((False, (17.56, 12.25, 13.92)), (True, (16.35, 11.54, 13.22))):
        found = (
            dense_macs(B16, class_row_only=class_row_only),
            pruned_macs(B16, one, class_row_only=class_row_only),
            pruned_macs(B16, schedule, class_row_only=class_row_only),
        )
        assert [round(macs / 1e9, 2) for macs in found] == list(expected)
    assert round(dense_macs(B16) / pruned_macs(B16, one), 3) == 1.417
