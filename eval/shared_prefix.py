"""Many pruned variants of one tower on the same batch: the blocks below every first cut run once.

Letters: B batch, L tokens, C width, D feature.
"""

from torch import Tensor, nn

from eval.rivals.budget import Rival
from patchrank.pruned import PrunedTower
from patchrank.tower import VisionTower


def first_cut(module: nn.Module, tower: VisionTower) -> int | None:
    """Number of blocks that `module` runs on all tokens of `tower`, unchanged; None where nothing can be shared."""
    if module is tower:
        return tower.config.num_layers
    if getattr(module, "tower", None) is not tower:
        return None
    if isinstance(module, Rival):
        return module.first_layer
    return min((layer for layer, _ in module.spec.cuts), default=None) if isinstance(module, PrunedTower) else None


def features(tower: VisionTower, modules: dict[str, nn.Module], image_BCHW: Tensor) -> dict[str, Tensor]:
    """Feature (B, D) float32 of every module on one batch; equal to calling each of them, bit by bit.

    Args: modules, name -> `tower` itself, a `PrunedTower` or rival of it, or any module image -> feature.
    """
    cuts = {name: first_cut(module, tower) for name, module in modules.items()}
    shared = sorted((layer, name) for name, layer in cuts.items() if layer is not None)
    found = {name: module(image_BCHW).float() for name, module in modules.items() if cuts[name] is None}
    x_BLC, done = (tower.embed(image_BCHW), 0) if shared else (None, 0)
    for layer, name in shared:
        if modules[name] is tower:
            found[name] = tower.finish(x_BLC, done).float()
            continue
        x_BLC, done = tower.run(x_BLC, done, layer), layer
        found[name] = modules[name].forward_from(x_BLC, layer).float()
    return {name: found[name] for name in modules}
