"""One affine map for the whole tower, on the fastest float32 kernel that the machine has.

The default float32 kernel of `F.linear` on CPU reaches half of what oneDNN reaches on some processors with AVX-512
(docs/results/cpu_kernels.json). For frozen weights outside tracing we call the oneDNN kernel, the one that
`torch.compile` itself picks; everywhere else this is exactly `F.linear`. Dense and pruned towers alike go through here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# The forms of GELU that oneDNN fuses into the product: our name -> (attribute, algorithm).
_FUSED = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the GELU of OpenAI's CLIP weights. Source: Hendrycks & Gimpel 2016, section 2."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, attribute: str = "none", algorithm: str = "") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attribute, [], algorithm)


class _FrozenLinear(torch.autograd.Function):
    """oneDNN product with a gradient to the input, and to the bias where it is trained."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return _onednn(grad.contiguous(), weight.t().contiguous(), None), None, grad_bias


def _onednn_applies(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) is Tensor
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not (torch.is_grad_enabled() and weight.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """act(x W^T + b): x (..., C_in), weight (C_out, C_in), bias (C_out) -> (..., C_out); act by name in ACTIVATIONS."""
    if not _onednn_applies(x, weight, bias):
        return ACTIVATIONS[activation](F.linear(x, weight, bias))
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return ACTIVATIONS[activation](_FrozenLinear.apply(x, weight, bias))
    if activation in _FUSED:
        return _onednn(x, weight, bias, *_FUSED[activation])
    return ACTIVATIONS[activation](_onednn(x, weight, bias))


class Linear(nn.Linear):
    """`nn.Linear` through `linear`; `activation` is applied to the result."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str = "none") -> None:
        super().__init__(in_features, out_features, bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.activation)
