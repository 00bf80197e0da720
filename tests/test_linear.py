"""`patchrank.linear` against `F.linear` and the activations, with and without gradients."""

import pytest
import torch
import torch.nn.functional as F

from patchrank.linear import ACTIVATIONS, Linear, linear


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (1, 1, 12), (0, 12)])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_the_plain_form_without_gradients(activation, shape, biased):
    x, weight = torch.randn(shape), torch.randn(20, 12)
    bias = torch.randn(20) if biased else None
    torch.testing.assert_close(
        linear(x, weight, bias, activation), ACTIVATIONS[activation](F.linear(x, weight, bias)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_to_the_input_equals_autograd(activation):
    x, weight, bias = torch.randn(3, 5, 12, requires_grad=True), torch.randn(20, 12), torch.randn(20)
    direction = torch.randn(3, 5, 20)
    (ours,) = torch.autograd.grad((linear(x, weight, bias, activation) * direction).sum(), x)
    (plain,) = torch.autograd.grad((ACTIVATIONS[activation](F.linear(x, weight, bias)) * direction).sum(), x)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(12,), (4, 12), (3, 5, 12)])
def test_a_trained_bias_gets_its_gradient_beside_frozen_weights(shape):
    weight, bias = torch.randn(20, 12), torch.randn(20, requires_grad=True)
    x, direction = torch.randn(shape), torch.randn(*shape[:-1], 20)
    (ours,) = torch.autograd.grad((linear(x, weight, bias, "gelu") * direction).sum(), bias)
    (plain,) = torch.autograd.grad((F.gelu(F.linear(x, weight, bias)) * direction).sum(), bias)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)


def test_training_weights_get_their_gradient():
    layer = Linear(12, 20, activation="gelu")
    layer(torch.randn(4, 12)).sum().backward()
    assert layer.weight.grad.abs().sum() > 0 and layer.bias.grad.abs().sum() > 0


def test_rows_do_not_depend_on_the_batch():
    weight, bias = torch.randn(20, 12), torch.randn(20)
    x = torch.randn(33, 12)
    assert torch.equal(linear(x, weight, bias, "gelu")[:5], linear(x[:5].clone(), weight, bias, "gelu"))
