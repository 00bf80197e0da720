"""The pair in open_clip's own format: a folder for `open_clip.create_model("local-dir:<folder>")`.

open_clip has no byte tokenizer and no option for masked padding, so a user of its text tower writes two lines more:

    model = open_clip.create_model("local-dir:out/pretrain/open_clip")
    model.text.use_pad_mask = True
    tokens = patchrank.text.tokenize(["a photo of a dog."], model.context_length)
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from patchrank.atomic import write_json, write_tensors
from patchrank.preprocess import Preprocess
from patchrank.pretrain.model import Pair
from patchrank.text import END, PAD, VOCABULARY


def save_open_clip(folder: Path, pair: Pair, preprocess: Preprocess) -> None:
    """Write open_clip_config.json and open_clip_model.safetensors (float32).

    Only for towers of `build_pair`: class token, no norm before the blocks, GELU.
    """
    write_tensors(folder / "open_clip_model.safetensors", open_clip_state(pair))
    write_json(folder / "open_clip_config.json", open_clip_config(pair, preprocess))


def open_clip_config(pair: Pair, preprocess: Preprocess) -> dict:
    """What open_clip builds the model from, as JSON values."""
    tower, text = pair.tower.config, pair.text.config
    vision = dict(
        image_size=tower.image_size[0], patch_size=tower.patch_size, width=tower.width, layers=tower.num_layers,
        head_width=tower.width // tower.num_heads, mlp_ratio=tower.mlp_width / tower.width, no_ln_pre=True,
    )  # fmt: skip
    words = dict(
        context_length=text.context, vocab_size=VOCABULARY, width=text.width, heads=text.num_heads,
        layers=text.num_layers, mlp_ratio=text.mlp_width / text.width, no_causal_mask=True, pool_type="eos",
        eos_id=END, pad_id=PAD,
    )  # fmt: skip
    transform = dict(
        size=list(preprocess.image_size), mode="RGB", mean=list(preprocess.mean), std=list(preprocess.std),
        interpolation=preprocess.interpolation, resize_mode=preprocess.mode,
    )  # fmt: skip
    model = dict(embed_dim=text.output_dim, vision_cfg=vision, text_cfg=words, custom_text=True)
    return {"model_cfg": model, "preprocess_cfg": transform}


@torch.no_grad()
def open_clip_state(pair: Pair) -> dict[str, Tensor]:
    """Our weights under open_clip's names (`CustomTextCLIP`)."""
    tower, text = pair.tower, pair.text
    state = {
        "logit_scale": pair.log_scale,
        "visual.class_embedding": tower.prefix[0],
        "visual.positional_embedding": torch.cat([torch.zeros_like(tower.prefix), tower.position]),
        "visual.conv1.weight": tower.patch.weight,
        "visual.ln_post.weight": tower.norm.weight,
        "visual.ln_post.bias": tower.norm.bias,
        "visual.proj": tower.proj.weight.T,
        "text.token_embedding.weight": text.token.weight,
        "text.positional_embedding": text.position,
        "text.ln_final.weight": text.norm.weight,
        "text.ln_final.bias": text.norm.bias,
        "text.text_projection": text.proj.weight.T,
    }
    for prefix, blocks in (("visual", tower.blocks), ("text", text.blocks)):
        for number, block in enumerate(blocks):
            state |= _block_state(f"{prefix}.transformer.resblocks.{number}", block)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _block_state(name: str, block: nn.Module) -> dict[str, Tensor]:
    places = {"ln_1": block.norm1, "attn.out_proj": block.out, "ln_2": block.norm2,
              "mlp.c_fc": block.fc1, "mlp.c_proj": block.fc2}  # fmt: skip
    state = {f"{name}.attn.in_proj_weight": block.qkv.weight, f"{name}.attn.in_proj_bias": block.qkv.bias}
    for theirs, layer in places.items():
        state |= {f"{name}.{theirs}.weight": layer.weight, f"{name}.{theirs}.bias": layer.bias}
    return state
