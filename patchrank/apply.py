"""`patchrank.apply(model, macs=0.7)`: the same kind of model with a pruned image tower, in one line, untrained."""

import copy
import importlib
from dataclasses import replace
from types import ModuleType

import torch
from torch import nn

from patchrank.adapters import ADAPTERS
from patchrank.errors import UserError
from patchrank.presets import resolve_spec
from patchrank.pruned import PrunedTower, Scorer
from patchrank.salient import SALIENT, Salient, default_scorer, salient_cost
from patchrank.scorers import SCORERS
from patchrank.spec import PruneSpec
from patchrank.tower import TowerConfig


def _adapter(model: nn.Module) -> ModuleType:
    """The adapter of the library that defines the model's class, or the nearest of its base classes."""
    for cls in type(model).__mro__:
        library = cls.__module__.partition(".")[0]
        if library in ADAPTERS and isinstance(model, nn.Module):
            return importlib.import_module(ADAPTERS[library])
    raise UserError(
        f"{type(model).__name__}: must be a model of {', '.join(ADAPTERS)}; wrappers must be taken off first"
    )


def _scorer(scorer: str | Scorer, config: TowerConfig, device: torch.device) -> Scorer:
    if isinstance(scorer, str):
        if scorer not in SCORERS:
            raise UserError(
                f"scorer={scorer!r}: unknown; choose one of {', '.join(SCORERS)}, {SALIENT}, or give a callable"
            )
        scorer = SCORERS[scorer](config.grid)
    if not callable(scorer):
        raise UserError(
            f"scorer={scorer!r}: must be a name or a callable (State) -> score (B, N); see patchrank.scorers"
        )
    return copy.deepcopy(scorer).to(device) if isinstance(scorer, nn.Module) else scorer


def _check_trained(pruned: PrunedTower, config: TowerConfig, tower: nn.Module, others: dict[str, object]) -> None:
    """Refuse a trained tower of another model, and arguments that it brings itself. Raises: UserError."""
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise UserError(f"{given[0]} given beside pruned: a trained tower brings it; leave {given[0]} out")
    mine, theirs = (replace(one, output_dim=None, output_bias=False) for one in (config, pruned.config))
    patch = pruned.tower.patch.weight
    if mine != theirs or not torch.equal(patch.to(tower.patch.weight), tower.patch.weight):
        raise UserError("pruned: was trained for other weights than this model's; train it for this model")


def apply(
    model: nn.Module,
    *,
    macs: float | None = None,
    keep: float | None = None,
    spec: PruneSpec | None = None,
    pruned: PrunedTower | None = None,
    layer: int | None = None,
    rest: str | None = None,
    scorer: str | Scorer | None = None,
) -> nn.Module:
    """Copy of a model whose image tower looks at fewer patches: same class, same methods, same outputs, no training.

    Takes open_clip's CLIP and CustomTextCLIP (so SigLIP), timm's VisionTransformer, and Hugging Face's CLIPModel,
    CLIPVisionModel, CLIPVisionModelWithProjection, SiglipModel and SiglipVisionModel, on any device, in any float
    dtype. The given model is not changed. In the copy the image tower's weights are frozen (requires_grad is False),
    everything else is copied as it is. Outputs that hold a token for every patch (`forward_features`,
    `last_hidden_state`, `output_tokens`) have all N under rest="fold", the kept ones in score order under "drop";
    what lies between the blocks (hidden states, attentions, intermediates) is refused when asked for.

    Args: exactly one of
        macs: share of the dense image tower's multiply-accumulates, in (0, 1], spent by the `accurate` preset. The
            last block is counted for one row where the library's output allows that, in both towers alike;
        keep: share of the patches that one cut before block `layer` (default: a quarter of the depth) leaves;
        spec: a whole `PruneSpec`;
        pruned: a tower trained for this model, from `predictors.load_pruned`: scorer, added tokens, calibrated
            weights. It is copied; nothing else may be given with it.
    rest: "fold" (default) averages a patch that is not kept into its nearest kept one, "drop" forgets it.
    scorer: "salient" (default for a tower with a class token) weighs likeness by the class token's attention
        (`select="cover"`); a row of `patchrank.scorers.SCORERS`, or (State) -> score (B, N), gives priorities of a
        covering selection (`select="suppress"`), of which "random" is the default where there is no class token.
    Raises: UserError for a model, a budget or a name outside these rules, and a `pruned` of other weights.
    """
    adapter = _adapter(model)
    if any(isinstance(module, PrunedTower) for module in model.modules()):
        raise UserError(f"{type(model).__name__}: pruned already; apply to the original model")
    tower = adapter.tower(model)
    config = tower.config
    if pruned is not None:
        others = {"macs": macs, "keep": keep, "spec": spec, "layer": layer, "rest": rest, "scorer": scorer}
        _check_trained(pruned, config, tower, others)
        return adapter.attach(model, copy.deepcopy(pruned).to(tower.patch.weight).requires_grad_(False))
    if scorer is None:
        scorer = default_scorer(config, spec)
    if scorer == SALIENT:
        has_class = config.num_prefix > 0
        covering = resolve_spec(
            config, macs=macs, keep=keep, spec=spec, layer=layer, rest=rest, cost=salient_cost(adapter.cost, has_class)
        )
        spec, scorer = (replace(covering, select="cover") if spec is None else covering), Salient(has_class)
    else:
        spec = resolve_spec(config, macs=macs, keep=keep, spec=spec, layer=layer, rest=rest, cost=adapter.cost)
    if spec.num_added:
        raise UserError(
            f"num_added={spec.num_added}: added tokens need trained weights; give pruned=predictors.load_pruned(...)"
        )
    return adapter.attach(model, PrunedTower(tower, spec, _scorer(scorer, config, tower.patch.weight.device)))
