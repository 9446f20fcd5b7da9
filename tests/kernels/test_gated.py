"""Gated activations in PyTorch: values, gradients, and one tensor for both halves' gradients."""

import pytest
import torch
import torch.nn.functional as F

from xlstm_kernels import gated_activation


@pytest.mark.parametrize(("activation", "function"), [("silu", F.silu), ("gelu", F.gelu)])
def test_values_and_gradients_are_those_of_two_operations(activation, function):
    x = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True)
    gate, up = x.chunk(2, dim=-1)
    expected = function(gate) * up
    weight = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
    got = gated_activation(x, activation)
    (gradient,) = torch.autograd.grad((got * weight).sum(), x)
    assert torch.equal(got, expected)
    torch.testing.assert_close(gradient, wanted, rtol=1e-13, atol=1e-13)
    assert gradient.is_contiguous()
    torch.autograd.gradcheck(lambda x: gated_activation(x, activation), x)


def test_two_halves_of_one_width_are_asked_for():
    with pytest.raises(ValueError, match="two halves"):
        gated_activation(torch.randn(2, 5), "silu")
    with pytest.raises(ValueError, match="'silu', 'gelu'"):
        gated_activation(torch.randn(2, 4), "relu")
