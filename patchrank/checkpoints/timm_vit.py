"""timm's `VisionTransformer`: class token, mean or attention pooling, registers, layer scale."""

import torch
from torch import Tensor, nn

from patchrank.checkpoints.weights import Weights, activation_name, build_tower, shared_norm_eps, unsupported
from patchrank.tower import TowerConfig, VisionTower

_POOLS = {"token": "class", "avg": "mean", "map": "attention"}


def _is_identity(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity)


def _block_fault(block: nn.Module) -> str | None:
    """What our block does not have, in words; None for a plain one."""
    import timm.layers
    from timm.models.vision_transformer import Block

    if type(block) is not Block or type(block.attn) is not timm.layers.Attention:
        return "blocks or attention of another kind"
    if type(block.mlp) is not timm.layers.Mlp:
        return "an MLP of another kind"
    if not isinstance(block.norm1, nn.LayerNorm):
        return "a norm other than LayerNorm"
    if not _is_identity(block.attn.q_norm) or not _is_identity(block.attn.k_norm):
        return "normalised queries and keys (qk_norm)"
    inner = getattr(block.attn, "norm", nn.Identity()), getattr(block.mlp, "norm", nn.Identity())
    if not all(map(_is_identity, inner)):
        return "a norm inside attention or MLP"
    if getattr(block.attn, "gate", None) is not None:
        return "gated attention"
    if block.attn.proj.bias is None:
        return "projections without bias"
    return None


def _model_fault(model: nn.Module) -> str | None:
    """What our tower does not have outside its blocks, in words; None for a plain model."""
    import timm.layers

    patch_embed = model.patch_embed
    if type(patch_embed) is not timm.layers.PatchEmbed or not _is_identity(patch_embed.norm):
        return "a hybrid or normalised patch embedding"
    if patch_embed.patch_size[0] != patch_embed.patch_size[1]:
        return "patches that are not square"
    if patch_embed.proj.in_channels != 3:
        return "images that are not RGB"
    if model.global_pool not in _POOLS:
        return f"pooling {model.global_pool!r}"
    over_prefix = {"token": model.pool_include_prefix, "avg": False, "map": True}[model.global_pool]
    if model.num_prefix_tokens and model.pool_include_prefix != over_prefix:
        where = "over" if model.pool_include_prefix else "without"
        return f"pooling {model.global_pool!r} {where} its prefix tokens"
    if not _is_identity(model.norm) and not _is_identity(model.fc_norm):
        return "two final norms"
    return None


def _refuse_variants(model: nn.Module, name: str) -> None:
    from timm.models.vision_transformer import VisionTransformer

    if type(model) is not VisionTransformer:
        raise unsupported(name, f"its class is {type(model).__name__}, not timm's VisionTransformer")
    faults = [_model_fault(model), *(_block_fault(block) for block in model.blocks)]
    for fault in filter(None, faults):
        raise unsupported(name, f"it has {fault}")


def timm_config(model: nn.Module, *, head: bool, name: str = "timm model") -> TowerConfig:
    """Our configuration of a timm VisionTransformer; `head` counts its last linear map to the tower."""
    _refuse_variants(model, name)
    block = model.blocks[0]
    has_head = head and isinstance(model.head, nn.Linear)
    norm = "before_pool" if not _is_identity(model.norm) else "none" if _is_identity(model.fc_norm) else "after_pool"
    return TowerConfig(
        image_size=tuple(model.patch_embed.img_size),
        patch_size=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        num_layers=len(model.blocks),
        num_heads=block.attn.num_heads,
        mlp_width=block.mlp.fc1.out_features,
        activation=activation_name(block.mlp.act, name),
        norm_eps=shared_norm_eps(model, name),
        num_prefix=model.num_prefix_tokens,
        patch_bias=model.patch_embed.proj.bias is not None,
        pre_norm=not _is_identity(model.norm_pre),
        layer_scale=not _is_identity(block.ls1),
        qkv_bias=block.attn.qkv.bias is not None,
        pool=_POOLS[model.global_pool],
        norm=norm,
        output_dim=model.head.out_features if has_head else None,
        output_bias=has_head and model.head.bias is not None,
    )


def _embedding_state(weights: Weights, config: TowerConfig, model: nn.Module) -> dict[str, Tensor]:
    """Patch embedding, prefix tokens with their own positions added, and the positions of the patches."""
    P, N, C, size = config.num_prefix, config.num_patches, config.width, config.patch_size
    state = {"patch.weight": weights.take("patch_embed.proj.weight", C, 3, size, size)}
    if config.patch_bias:
        state["patch.bias"] = weights.take("patch_embed.proj.bias", C)
    parts = [state["patch.weight"].new_zeros(1, 0, C)]
    if model.has_class_token:
        parts.append(weights.take("cls_token", 1, 1, C))
    if model.num_reg_tokens:
        parts.append(weights.take("reg_token", 1, model.num_reg_tokens, C))
    prefix_PC = torch.cat(parts, dim=1)[0]
    if model.pos_embed is None:
        position_LC = prefix_PC.new_zeros(P + N, C)
    elif model.no_embed_class:
        position_LC = torch.cat([torch.zeros_like(prefix_PC), weights.take("pos_embed", 1, N, C)[0]])
    else:
        position_LC = weights.take("pos_embed", 1, P + N, C)[0]
    state |= {"prefix": prefix_PC + position_LC[:P], "position": position_LC[P:]}
    return state | (weights.take_norm("norm_pre", "norm_pre", C) if config.pre_norm else {})


def _block_state(weights: Weights, config: TowerConfig, index: int) -> dict[str, Tensor]:
    theirs = ours = f"blocks.{index}"
    C, M = config.width, config.mlp_width
    state = weights.take_norm(f"{theirs}.norm1", f"{ours}.norm1", C)
    state |= weights.take_linear(f"{theirs}.attn.qkv", f"{ours}.qkv", 3 * C, C, config.qkv_bias)
    state |= weights.take_linear(f"{theirs}.attn.proj", f"{ours}.out", C, C)
    state |= weights.take_norm(f"{theirs}.norm2", f"{ours}.norm2", C)
    state |= weights.take_linear(f"{theirs}.mlp.fc1", f"{ours}.fc1", M, C)
    state |= weights.take_linear(f"{theirs}.mlp.fc2", f"{ours}.fc2", C, M)
    if config.layer_scale:
        state |= {f"{ours}.scale{half}": weights.take(f"{theirs}.ls{half}.gamma", C) for half in (1, 2)}
    return state


def _pool_state(weights: Weights, config: TowerConfig) -> dict[str, Tensor]:
    C, M = config.width, config.mlp_width
    state = {"pool.query": weights.take("attn_pool.latent", 1, 1, C)}
    for theirs, ours, num_out, num_in in (
        ("q", "q", C, C),
        ("kv", "kv", 2 * C, C),
        ("proj", "out", C, C),
        ("mlp.fc1", "fc1", M, C),
        ("mlp.fc2", "fc2", C, M),
    ):
        state |= weights.take_linear(f"attn_pool.{theirs}", f"pool.{ours}", num_out, num_in)
    return state | weights.take_norm("attn_pool.norm", "pool.norm", C)


def timm_state(weights: Weights, config: TowerConfig, model: nn.Module) -> dict[str, Tensor]:
    """Our state dict from timm's names; the head too where `config` has an output projection."""
    state = _embedding_state(weights, config, model)
    for index in range(config.num_layers):
        state |= _block_state(weights, config, index)
    if config.norm != "none":
        state |= weights.take_norm("norm" if config.norm == "before_pool" else "fc_norm", "norm", config.width)
    if config.pool == "attention":
        state |= _pool_state(weights, config)
    if config.output_dim:
        state |= weights.take_linear("head", "proj", config.output_dim, config.width, config.output_bias)
    return state


def tower_from_timm(model: nn.Module, *, head: bool = True, name: str = "timm model") -> VisionTower:
    """Tower with copied weights whose output is `model(image)`, or what enters the head with `head=False`.

    Raises: UserError for a model that is not a plain VisionTransformer, naming the part that stands in the way.
    """
    config = timm_config(model, head=head, name=name)
    state = model.state_dict()
    if not head:
        state = {key: tensor for key, tensor in state.items() if key not in ("head.weight", "head.bias")}
    weights = Weights(state, name)
    ours = timm_state(weights, config, model)
    weights.close()
    return build_tower(config, ours, name)
