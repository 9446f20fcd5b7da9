"""The deterministic cumulative sum."""

import pytest
import torch

from xlstm_kernels.common.cumulative_sum import cumulative_sum


@pytest.mark.parametrize("length", [0, 1, 2, 127, 128, 129, 1000, 20_000])
def test_equals_cumsum(length, deterministic):
    x = torch.randn(2, 3, length, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    got, expected = cumulative_sum(x), x.cumsum(-1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-11)
    (gradient,) = torch.autograd.grad(got, x, weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x, weight)[0])
