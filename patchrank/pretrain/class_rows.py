"""How much the class token looks at each patch, block by block, beside an ordinary pass; no n x n map is ever made.

Letters: B pictures, P prefix tokens, N patches, L = P + N tokens, C width, H heads, S blocks.
"""

import torch
from torch import Tensor

from patchrank.tower import Block, VisionTower


def class_row(block: Block, x_BLC: Tensor, key_BLC: Tensor) -> Tensor:
    """Attention of token 0 to all tokens, mean over heads: (B, L) float32, rows sum to 1.

    Args: the block's input (B, L, C) and its keys (B, L, C) from `Block.attend`; one row of logits, in float32.
    """
    query_B1C = block.qkv(block.norm1(x_BLC[:, :1]))[..., : x_BLC.shape[-1]]
    with torch.autocast(x_BLC.device.type, enabled=False):
        query_BHM = query_B1C.float().unflatten(-1, (block.num_heads, -1)).squeeze(1)
        key_BLHM = key_BLC.float().unflatten(-1, (block.num_heads, -1))
        logits_BHL = torch.einsum("bhm,blhm->bhl", query_BHM, key_BLHM) * query_BHM.shape[-1] ** -0.5
        return logits_BHL.softmax(-1).mean(1)


def run_with_class_rows(tower: VisionTower, x_BLC: Tensor, *, patches: bool) -> tuple[Tensor, Tensor]:
    """All blocks on tokens (B, P + N, C), and the class token's attention to the patches in each.

    Args: patches: whether the patches are wanted behind the last block; without them a tower that pools its class
    token computes just that row there, and only one token comes back.
    Returns: tokens (B, L or 1, C) behind the last block, not normed, and rows (B, S, N) float32.
    Raises: ValueError for a tower without prefix tokens.
    Source: A-CLIP averages exactly these rows over all layers and heads; its released code stores every layer's full
    map to get them (1.4 GB at batch 64 of ViT-B/16).
    """
    num_prefix, rows = tower.config.num_prefix, []
    if num_prefix == 0:
        raise ValueError("class attention: this tower has no class token; choose a masker that needs no teacher")
    *lower, last = tower.blocks
    for block in lower:
        attended_BLC, key_BLC = block.attend(x_BLC)
        rows.append(class_row(block, x_BLC, key_BLC))
        x_BLC = block.mlp(attended_BLC)
    if patches or tower.config.pool != "class":
        attended_BLC, key_BLC = last.attend(x_BLC)
        rows.append(class_row(last, x_BLC, key_BLC))
    else:
        attended_BLC = last.attend_rows(x_BLC, 1)
        rows.append(class_row(last, x_BLC, last.keys(x_BLC)))
    return last.mlp(attended_BLC), torch.stack(rows, dim=1)[..., num_prefix:]
