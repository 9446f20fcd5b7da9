"""The causal convolution against its plain definition."""

import pytest
import torch
from torch.nn.functional import conv1d, pad, silu

from xlstm_kernels import causal_conv1d

B, C = 2, 3


def documents_apart(x, weight, bias, state, boundaries):
    """Each document of each row convolved on its own, by torch's conv1d; and the last state."""
    width = weight.shape[1]
    rows, states = [], []
    for row in range(B):
        starts = [t for t in range(1, x.shape[1]) if boundaries[row, t]]
        outs = []
        for begin, end in zip([0, *starts], [*starts, x.shape[1]], strict=True):
            before = x.new_zeros(C, width - 1)
            if begin == 0 and not boundaries[row, 0]:
                before = state[row]
            seen = torch.cat([before, x[row, begin:end].t()], 1)
            outs.append(conv1d(seen[None], weight[:, None], bias, groups=C)[0].t())
        rows.append(torch.cat(outs))
        states.append(seen[:, seen.shape[1] - (width - 1) :])
    return torch.stack(rows), torch.stack(states)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("s", [1, 2, 3, 11])
@pytest.mark.parametrize("starts", ["none", "some", "all"])
def test_values_state_and_gradients(width, s, starts):
    torch.manual_seed(0)
    inputs = [torch.randn(B, s, C), torch.randn(C, width), torch.randn(C)]
    inputs += [torch.randn(B, C, width - 1)]
    inputs = [x.double().requires_grad_() for x in inputs]
    boundaries = torch.rand(B, s) < {"none": 0.0, "some": 0.4, "all": 1.1}[starts]
    expected = documents_apart(*inputs, boundaries)
    passed = None if starts == "none" else boundaries
    got = causal_conv1d(*inputs, boundaries=passed, return_last_state=True)
    upstream = [torch.randn_like(x) for x in expected]
    used = inputs if width > 1 else inputs[:3]
    options = {"allow_unused": True, "materialize_grads": True}
    d_expected = torch.autograd.grad(expected, used, upstream, **options)
    d_got = torch.autograd.grad(got, used, upstream, **options)
    for a, b in zip([*got, *d_got], [*expected, *d_expected], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", range(6))
def test_boundary_at_every_position(position):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(B, 6, C), torch.randn(C, 4), torch.randn(C)
    state = torch.randn(B, C, 3)
    boundaries = torch.zeros(B, 6, dtype=torch.bool)
    boundaries[0, position] = True
    expected, last = documents_apart(x, weight, bias, state, boundaries)
    y, got_last = causal_conv1d(
        x, weight, bias, state, activation="silu", boundaries=boundaries, return_last_state=True
    )
    torch.testing.assert_close(y, silu(expected))
    torch.testing.assert_close(got_last, last)


def test_two_segments_are_one_sequence():
    torch.manual_seed(0)
    x, weight = torch.randn(B, 9, C), torch.randn(C, 4)
    y1, state = causal_conv1d(x[:, :2], weight, return_last_state=True)
    y2 = causal_conv1d(x[:, 2:], weight, None, state)
    torch.testing.assert_close(torch.cat([y1, y2], 1), causal_conv1d(x, weight))


def test_keeps_bfloat16_and_sums_in_float32():
    torch.manual_seed(0)
    x, weight = torch.randn(B, 9, C).bfloat16(), torch.randn(C, 4)
    exact = conv1d(pad(x.double().mT, (3, 0)), weight.double()[:, None], groups=C).mT
    y = causal_conv1d(x, weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)
