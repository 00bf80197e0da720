"""Attention of all heads at once: PyTorch's fused kernel, or plain products where that kernel's gradient is slow.

In bfloat16 on a CPU the fused kernel's gradient takes four to six times as long as its own float32 one, more than all
affine maps of a block together (docs/results/cpu_kernels_amx.json); two batched products and a softmax do not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q_BHQE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, bias_B11L: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(E) + bias) v: (B, H, Q, E), in the dtype of its input.

    Args: bias_B11L: added to every query's logit of a key. The plain products store their (B, H, Q, L) weights.
    Source: Vaswani et al. 2017, equation 1.
    """
    trained = torch.is_grad_enabled() and (q_BHQE.requires_grad or k_BHLE.requires_grad or v_BHLE.requires_grad)
    if not (trained and q_BHQE.dtype == torch.bfloat16 and q_BHQE.device.type == "cpu"):
        return F.scaled_dot_product_attention(q_BHQE, k_BHLE, v_BHLE, attn_mask=bias_B11L)
    logit_BHQL = (q_BHQE * q_BHQE.shape[-1] ** -0.5) @ k_BHLE.mT
    if bias_B11L is not None:
        logit_BHQL = logit_BHQL + bias_B11L
    return logit_BHQL.softmax(-1).to(v_BHLE.dtype) @ v_BHLE
