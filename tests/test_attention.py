"""`patchrank.attention` against its definition in float64, where the fused kernel computes and where ours does."""

import pytest
import torch
import torch.nn.functional as F

from patchrank.attention import attention

BATCH, HEADS, QUERIES, KEYS, WIDTH = 3, 2, 5, 9, 8


def _inputs(dtype: torch.dtype, biased: bool) -> tuple:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(BATCH, HEADS, QUERIES, WIDTH, generator=generator)
    k, v = torch.randn(2, BATCH, HEADS, KEYS, WIDTH, generator=generator)
    bias = torch.randn(BATCH, 1, 1, KEYS, generator=generator)
    bias[0, ..., -3:] = float("-inf")
    return *(x.to(dtype).requires_grad_() for x in (q, k, v)), bias.to(dtype) if biased else None


def _defined(q, k, v, bias):
    weights = []
    for row, keys in zip(q.double().flatten(0, 1), k.double().flatten(0, 1), strict=True):
        weights.append(row @ keys.T / WIDTH**0.5)
    logits = torch.stack(weights).unflatten(0, (BATCH, HEADS))
    return torch.softmax(logits if bias is None else logits + bias.double(), -1) @ v.double()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_are_those_of_the_definition(dtype, tolerance, biased):
    q, k, v, bias = _inputs(dtype, biased)
    direction = torch.randn(BATCH, HEADS, QUERIES, WIDTH, generator=torch.Generator().manual_seed(4))
    ours, plain = attention(q, k, v, bias), _defined(q, k, v, bias)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), plain, rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad((ours * direction).sum(), (q, k, v))
    expected = torch.autograd.grad((plain * direction).sum(), (q, k, v))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def test_the_fused_kernel_computes_all_but_gradients_in_bfloat16_on_a_cpu(monkeypatch):
    fused, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    attention(*_inputs(torch.float32, True))
    with torch.no_grad():
        attention(*_inputs(torch.bfloat16, True))
    assert len(calls) == 2
    attention(*_inputs(torch.bfloat16, True))
    assert len(calls) == 2
