"""open_clip's image towers: its own `VisionTransformer` (OpenAI, LAION, MetaCLIP, CLIPA) and timm trunks (SigLIP)."""

from dataclasses import replace

from torch import Tensor, nn

from patchrank.checkpoints.timm_vit import timm_config, timm_state
from patchrank.checkpoints.weights import Weights, activation_name, build_tower, shared_norm_eps, unsupported
from patchrank.tower import TowerConfig, VisionTower

_POOLS = {"tok": "class", "avg": "mean"}


def _refuse_variants(visual: nn.Module, name: str) -> None:
    """Raise for every option of open_clip's VisionTransformer that our tower does not have."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if type(visual) is not VisionTransformer:
        raise unsupported(name, f"its class is {type(visual).__name__}, not a vision transformer")
    patch_height, patch_width = visual.patch_size
    rules = {
        "an attentional pooler (CoCa)": visual.attn_pool is None,
        f"pooling {visual.pool_type!r}": visual.pool_type in _POOLS,
        "attention with normalised or scaled queries, keys or heads": all(
            type(block) is ResidualAttentionBlock for block in visual.transformer.resblocks
        ),
        "patches that are not square": patch_height == patch_width,
    }
    broken = [what for what, holds in rules.items() if not holds]
    if broken:
        raise unsupported(name, f"it has {broken[0]}")


def native_config(visual: nn.Module, name: str = "open_clip model") -> TowerConfig:
    """Our configuration of open_clip's own VisionTransformer."""
    _refuse_variants(visual, name)
    block = visual.transformer.resblocks[0]
    return TowerConfig(
        image_size=tuple(visual.image_size),
        patch_size=visual.patch_size[0],
        width=visual.conv1.out_channels,
        num_layers=len(visual.transformer.resblocks),
        num_heads=block.attn.num_heads,
        mlp_width=block.mlp.c_fc.out_features,
        activation=activation_name(block.mlp.gelu, name),
        norm_eps=shared_norm_eps(visual, name),
        pre_norm=not isinstance(visual.ln_pre, nn.Identity),
        layer_scale=not isinstance(block.ls_1, nn.Identity),
        pool=_POOLS[visual.pool_type],
        norm="after_pool" if visual.final_ln_after_pool else "before_pool",
        output_dim=None if visual.proj is None else visual.proj.shape[1],
    )


def _block_state(weights: Weights, config: TowerConfig, index: int) -> dict[str, Tensor]:
    theirs, ours = f"transformer.resblocks.{index}", f"blocks.{index}"
    C, M = config.width, config.mlp_width
    state = weights.take_norm(f"{theirs}.ln_1", f"{ours}.norm1", C)
    state |= weights.take_fused_qkv(f"{theirs}.attn", f"{ours}.qkv", C)
    state |= weights.take_linear(f"{theirs}.attn.out_proj", f"{ours}.out", C, C)
    state |= weights.take_norm(f"{theirs}.ln_2", f"{ours}.norm2", C)
    state |= weights.take_linear(f"{theirs}.mlp.c_fc", f"{ours}.fc1", M, C)
    state |= weights.take_linear(f"{theirs}.mlp.c_proj", f"{ours}.fc2", C, M)
    if config.layer_scale:
        state |= {f"{ours}.scale{half}": weights.take(f"{theirs}.ls_{half}.gamma", C) for half in (1, 2)}
    return state


def native_state(weights: Weights, config: TowerConfig) -> dict[str, Tensor]:
    """Our state dict from open_clip's names (without "visual.")."""
    N, C, size = config.num_patches, config.width, config.patch_size
    position_LC = weights.take("positional_embedding", 1 + N, C)
    state = {
        "patch.weight": weights.take("conv1.weight", C, 3, size, size),
        "prefix": weights.take("class_embedding", C)[None] + position_LC[:1],
        "position": position_LC[1:],
    }
    if config.pre_norm:
        state |= weights.take_norm("ln_pre", "norm_pre", C)
    for index in range(config.num_layers):
        state |= _block_state(weights, config, index)
    state |= weights.take_norm("ln_post", "norm", C)
    if config.output_dim:
        state["proj.weight"] = weights.take("proj", C, config.output_dim).T
    return state


def _trunk_config(visual: nn.Module, name: str) -> TowerConfig:
    """A timm trunk followed by nothing or by one linear projection."""
    config = timm_config(visual.trunk, head=True, name=name)
    others = [part for part in visual.head if not isinstance(part, (nn.Dropout, nn.Linear))]
    proj = getattr(visual.head, "proj", None)
    if others or (proj is not None and config.output_dim is not None):
        raise unsupported(name, "its projection is more than one linear map")
    if proj is None:
        return config
    return replace(config, output_dim=proj.out_features, output_bias=proj.bias is not None)


def _trunk_state(weights: Weights, config: TowerConfig, visual: nn.Module) -> dict[str, Tensor]:
    """Our state dict from the names of a timm trunk ("trunk.") and of its projection ("head.proj")."""
    if not hasattr(visual.head, "proj"):
        return timm_state(weights.under("trunk."), config, visual.trunk)
    state = timm_state(weights.under("trunk."), replace(config, output_dim=None), visual.trunk)
    return state | weights.take_linear("head.proj", "proj", config.output_dim, config.width, config.output_bias)


def _is_trunk(visual: nn.Module) -> bool:
    return type(visual).__name__ == "TimmModel"


def open_clip_config(visual: nn.Module, *, name: str = "open_clip model") -> TowerConfig:
    """Our configuration of an open_clip image tower; its weights may be on device `meta`.

    Raises: UserError for a tower that is not a plain ViT, naming the part that stands in the way.
    """
    return _trunk_config(visual, name) if _is_trunk(visual) else native_config(visual, name)


def tower_from_open_clip(visual: nn.Module, *, name: str = "open_clip model") -> VisionTower:
    """Tower with copied weights whose output is that of `model.visual(image)`, before normalisation.

    Raises: UserError as `open_clip_config`.
    """
    config = open_clip_config(visual, name=name)
    weights = Weights(visual.state_dict(), name)
    state = _trunk_state(weights, config, visual) if _is_trunk(visual) else native_state(weights, config)
    weights.close()
    return build_tower(config, state, name)
