"""Pruned variants of one image, evaluated fast: everything below the cut is computed once.

Exact shortcuts only: the blocks below the cut and the fold metric run once per image, the last block computes the class
row only, many variants of one image go through in one chunk of a fixed, recorded size. What is computed, padding
included, is counted.

Letters: V variants, N patches, K kept, L tokens, C width, D feature.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchrank.macs import block_macs, cut_macs, embed_macs, finish_macs
from patchrank.pruned import State, apply_cut, finish, fold_metric, start_state
from patchrank.search.gates import closing_gradients, gate_gradients
from patchrank.spec import PruneSpec
from patchrank.tower import VisionTower

CHUNK = 16
"""Variants per call: the working set of ViT-Ti and ViT-B/32 stays in the second-level cache."""


def order_of_masks(mask_VN: Tensor) -> Tensor:
    """Keep masks (V, N) bool with equal counts -> (V, N) int64: kept indices rising, then the rest rising."""
    return torch.sort(mask_VN.to(torch.uint8), dim=1, descending=True, stable=True).indices


@dataclass
class Variants:
    """One image at the cut, ready to be pruned in many ways; counts the MACs it spends."""

    tower: VisionTower
    spec: PruneSpec
    state: State
    metric_1NM: Tensor | None
    dense_D: Tensor
    chunk: int = CHUNK
    macs: int = field(default=0)

    @property
    def num_patches(self) -> int:
        """N."""
        return self.state.position_BN.shape[1]

    @property
    def layer(self) -> int:
        """The layer of the (only) cut."""
        return self.spec.cuts[0][0]

    def features(self, mask_VN: Tensor) -> Tensor:
        """Features (V, D) float of the variants that keep `mask_VN` (V, N) bool; all rows keep equally many.

        A call of more than `chunk` variants runs in full chunks, its tail padded; a smaller call is one small chunk.
        """
        K, num = int(mask_VN[0].sum()), len(mask_VN)
        order_VN = order_of_masks(mask_VN)
        if num > self.chunk:
            order_VN = torch.cat([order_VN, order_VN[-1:].expand(-num % self.chunk, -1)])
        self.macs += len(order_VN) * variant_macs(self.tower, self.spec, self.num_patches, K)
        return torch.cat([self._chunk(part_VN, K) for part_VN in order_VN.split(self.chunk)])[:num]

    def _chunk(self, order_VN: Tensor, K: int) -> Tensor:
        state = self.expand(len(order_VN))
        metric_VNM = None if self.metric_1NM is None else self.metric_1NM.expand(len(order_VN), -1, -1)
        after, _ = apply_cut(state, order_VN, K, self.spec, metric_VNM)
        return finish(self.tower, after, self.layer)

    def gradients(
        self, mask_VN: Tensor, damage: Callable[[Tensor], Tensor], num_probes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Gate gradients and squared sensitivities (V, N) at the keep masks: `gates.gate_gradients`, counted."""
        self.macs += len(mask_VN) * gradient_macs(self.tower, self.spec, self.num_patches, num_probes)
        return gate_gradients(self, mask_VN, damage, num_probes, generator)

    def closing(
        self, alive_N: Tensor, damage: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The feature (D,) that keeps `alive_N` (N,) bool, and gate gradients and squared sensitivities (N,) of these
        patches, 0 elsewhere: `gates.closing_gradients` with one probe, counted."""
        K = int(alive_N.sum())
        self.macs += 5 * variant_macs(self.tower, self.spec, self.num_patches, K)
        after, cut = apply_cut(self.expand(1), order_of_masks(alive_N.unsqueeze(0)), K, self.spec, self.metric_1NM)
        feature_1D, *slopes = closing_gradients(self, after, damage, 1, generator)
        spread = [
            slope_1K.new_zeros(self.num_patches).index_copy(0, cut.keep_BK[0], slope_1K[0]) for slope_1K in slopes
        ]
        return feature_1D[0], spread[0], spread[1]

    def expand(self, num: int) -> State:
        """The image's state, `num` times, without copying."""
        state = self.state
        return State(
            x_BLC=state.x_BLC.expand(num, -1, -1),
            num_prefix=state.num_prefix,
            position_BN=state.position_BN.expand(num, -1),
            size_BN=None,
            block=state.block,
            grid=state.grid,
        )


def variant_macs(tower: VisionTower, spec: PruneSpec, num_patches: int, K: int) -> int:
    """MACs of one variant behind the cached prefix; the metric's projection is cached too."""
    config = tower.config
    num_tokens = config.num_prefix + K
    fold = cut_macs(config, spec, 0, num_patches, K)
    return fold + finish_macs(config, num_tokens, spec.cuts[0][0])


def gradient_macs(tower: VisionTower, spec: PruneSpec, num_patches: int, num_probes: int) -> int:
    """MACs of one variant's gate gradients: all patches in the sequence, each backward pass counted as two forwards."""
    config = tower.config
    fold = num_patches**2 * (config.width // config.num_heads + config.width) if spec.rest == "fold" else 0
    forward = fold + finish_macs(config, config.num_prefix + num_patches, spec.cuts[0][0])
    return (1 + 2 * (1 + num_probes)) * forward


def prefix_macs(tower: VisionTower, spec: PruneSpec) -> int:
    """MACs spent once per image: embedding, blocks below the cut, fold metric, the dense feature."""
    config = tower.config
    num_tokens = config.num_prefix + config.num_patches
    metric = num_tokens * config.width**2 if spec.rest == "fold" else 0
    layer = spec.cuts[0][0]
    below = embed_macs(config) + layer * block_macs(config, num_tokens)
    return below + metric + finish_macs(config, num_tokens, layer)


def prepare(tower: VisionTower, image_CHW: Tensor, spec: PruneSpec, chunk: int = CHUNK) -> Variants:
    """Run what all variants of an image (3, H, W) share. The spec has one cut, before its layer."""
    layer = spec.cuts[0][0]
    x_1LC = tower.run(tower.embed(image_CHW.unsqueeze(0)), 0, layer)
    state = start_state(tower, x_1LC, layer)
    metric_1NM = fold_metric(state) if spec.rest == "fold" else None
    dense_D = tower.finish(x_1LC, layer)[0]
    return Variants(tower, spec, state, metric_1NM, dense_D, chunk, prefix_macs(tower, spec))
