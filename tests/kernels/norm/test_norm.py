"""The per-head norm and its output gate against plain definitions."""

import pytest
import torch
from torch.nn.functional import layer_norm

from xlstm_kernels import multihead_norm


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("lead", [(), (5,), (2, 5)])
def test_values_and_gradients(kind, lead):
    torch.manual_seed(0)
    heads, d, eps = 3, 4, 1e-2
    x = torch.randn(*lead, heads, d, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(heads * d, dtype=torch.float64, requires_grad=True)
    parts = []
    for head in range(heads):
        part, scale = x[..., head, :], weight[head * d : (head + 1) * d]
        if kind == "layernorm":
            parts.append(layer_norm(part, (d,), scale, None, eps))
        else:
            parts.append(part / (part.square().mean(-1, keepdim=True) + eps).sqrt() * scale)
    torch.testing.assert_close(multihead_norm(x, weight, kind, eps), torch.stack(parts, -2))
    assert torch.autograd.gradcheck(lambda x, w: multihead_norm(x, w, kind, eps), (x, weight))


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_computes_bfloat16_in_float32(kind):
    torch.manual_seed(0)
    x, weight = torch.randn(7, 2, 64).bfloat16(), torch.randn(128)
    y = multihead_norm(x, weight, kind, 1e-6)
    assert y.dtype == torch.bfloat16
    exact = multihead_norm(x.double(), weight, kind, 1e-6)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_output_gate(kind):
    torch.manual_seed(0)
    x, gate = (torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(12, dtype=torch.float64, requires_grad=True)
    plain = multihead_norm(x, weight, kind, 1e-3)
    gated = multihead_norm(x, weight, kind, 1e-3, gate=gate)
    torch.testing.assert_close(gated, plain * gate.sigmoid())
    assert torch.autograd.gradcheck(
        lambda x, w, g: multihead_norm(x, w, kind, 1e-3, gate=g), (x, weight, gate)
    )


def test_gated_norm_is_rounded_once():
    torch.manual_seed(0)
    x, gate, weight = torch.randn(7, 2, 64), torch.randn(7, 2, 64), torch.randn(128)
    x, gate = x.bfloat16(), gate.bfloat16()
    exact = multihead_norm(x.double(), weight, "layernorm", 1e-6, gate=gate.double())
    y = multihead_norm(x, weight, "layernorm", 1e-6, gate=gate)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)
