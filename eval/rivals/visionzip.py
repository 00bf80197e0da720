"""VisionZip-style: dominant patches by class attention, contextual ones that gather the others; training-free.

Source: Yang et al. 2025, "VisionZip: Longer is Better but Not Necessary in Vision Language Models", section 3.2, and
its code (docs/rivals.md): the patches with most class attention stay as they are; of the others some, evenly spaced,
become targets, and each of the rest joins the target of most similar key, mean over heads; a target becomes its own
token plus the mean of its guests.
Deviations: the paper reduces what a language model sees, behind the image tower; here it happens in one block a
quarter up, between attention and MLP, so that the tower itself saves. Dominant to contextual 54 : 10 as its 64-token
setting, which counts the class token among the 54.

Letters: B batch, N patches present, D dominant, T targets, R others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.rivals.budget import class_token, nearest_setting
from eval.rivals.evit import class_row
from eval.rivals.walk import Step, Walk
from patchrank.presets import default_layer
from patchrank.tokens import gather_tokens, rank
from patchrank.tower import TowerConfig, VisionTower

_DOMINANT = 54 / 64


def split(K: int) -> tuple[int, int]:
    """Dominant and contextual patches of K >= 2, at least one of each."""
    num_dominant = min(K - 1, max(1, round(K * _DOMINANT)))
    return num_dominant, K - num_dominant


def targets(num_rest: int, num_targets: int) -> list[int]:
    """Evenly spaced places among the patches that are not dominant, from the first in whole steps."""
    return [place * (num_rest // num_targets) for place in range(num_targets)]


def contextual(rest_BRC: Tensor, metric_BRM: Tensor, place_T: list[int]) -> Tensor:
    """Targets (B, T, C), each plus the mean of its guests. Args: patches (B, R, C) and their keys (B, R, M)."""
    others = sorted(set(range(rest_BRC.shape[1])) - set(place_T))
    unit_BRM = F.normalize(metric_BRM, dim=-1)
    host_BO = (unit_BRM[:, others] @ unit_BRM[:, place_T].mT).argmax(-1)
    none_BT, ones_BO = rest_BRC.new_zeros(len(rest_BRC), len(place_T)), rest_BRC.new_ones(host_BO.shape)
    num_BT1 = none_BT.scatter_add(1, host_BO, ones_BO).clamp_min(1).unsqueeze(-1)
    targets_BTC, guest_BOC = rest_BRC[:, place_T], rest_BRC[:, others]
    sum_BTC = torch.zeros_like(targets_BTC).scatter_add(1, host_BO.unsqueeze(-1).expand_as(guest_BOC), guest_BOC)
    return targets_BTC + sum_BTC / num_BT1


def choice_macs(config: TowerConfig, K: int) -> int:
    """The class row once more, and the similarities of the others to the targets."""
    num_targets = split(K)[1]
    others, width = config.num_patches - K, config.width
    row = width * width + width * (config.num_prefix + config.num_patches)
    return row + others * num_targets * (width // config.num_heads)


class VisionZip(Walk):
    """A tower that goes from N to K patches in block `layer`; K = N leaves it as it is."""

    def __init__(self, tower: VisionTower, layer: int, K: int) -> None:
        config = tower.config
        saves = K < config.num_patches
        super().__init__(tower, {layer: K} if saves else {}, {layer: choice_macs(config, K)} if saves else {})

    def reduce(self, step: Step) -> tuple[Tensor, None]:
        prefix = step.num_prefix
        patches_BNC, num_patches = step.x_BLC[:, prefix:], step.x_BLC.shape[1] - prefix
        num_dominant, num_targets = split(self.left[step.layer])
        order_BN = rank(class_row(step.block, step.before_BLC, step.key_BLC)[:, prefix:])
        rest_BR = order_BN[:, num_dominant:].sort(dim=1).values
        key_BNM = step.block.mean_head(step.key_BLC[:, prefix:])
        targets_BTC = contextual(
            gather_tokens(patches_BNC, rest_BR),
            gather_tokens(key_BNM, rest_BR),
            targets(num_patches - num_dominant, num_targets),
        )
        dominant = gather_tokens(patches_BNC, order_BN[:, :num_dominant])
        return torch.cat([step.x_BLC[:, :prefix], dominant, targets_BTC], dim=1), None


def build(tower: VisionTower, macs: float) -> VisionZip:
    """VisionZip at a budget. Raises: UserError without class token or for a budget out of reach."""
    class_token(tower, "visionzip")
    config = tower.config
    layer = default_layer(config.num_layers)
    cost = lambda K: VisionZip(tower, layer, K).macs  # noqa: E731
    return VisionZip(tower, layer, nearest_setting(config, macs, cost, config.num_patches, 2))
