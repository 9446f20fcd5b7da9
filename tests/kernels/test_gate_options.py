"""What blocks may leave to the kernels, on torch: the gates' soft cap, the norm's output gate."""

import pytest
import torch

from xlstm_kernels import mlstm_chunkwise, mlstm_step, multihead_norm

CAP = 2.0


def capped(x):
    return CAP * torch.tanh(x / CAP)


def mlstm_inputs():
    torch.manual_seed(0)
    x = [torch.randn(2, 3, 40, d, dtype=torch.float64) for d in (8, 8, 12)]
    x += [4 * torch.randn(2, 3, 40, dtype=torch.float64) for _ in range(2)]
    return [one.requires_grad_() for one in x]


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_soft_cap_of_the_gates_in_values_and_gradients(gate):
    q, k, v, i, f = x = mlstm_inputs()
    expected = mlstm_chunkwise(q, k, v, capped(i), capped(f), gate=gate, backend="torch")
    got = mlstm_chunkwise(*x, gate=gate, gate_soft_cap=CAP, backend="torch")
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(h, x, weight) for h in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_soft_cap_is_computed_in_the_precision_of_gates():
    """A bfloat16 pre-activation is capped in float32, as the Triton gate pass does."""
    q, k, v, i, f = (x.detach().bfloat16() for x in mlstm_inputs())
    got = mlstm_chunkwise(q, k, v, i, f, gate_soft_cap=CAP, backend="torch")
    expected = mlstm_chunkwise(q, k, v, capped(i.float()), capped(f.float()), backend="torch")
    assert torch.equal(got, expected)


def test_soft_cap_of_a_step():
    one = [x.detach()[:, :, 0] for x in mlstm_inputs()]
    states = []
    for gates, options in ((one[3:], {"gate_soft_cap": CAP}), ([capped(x) for x in one[3:]], {})):
        state = tuple(torch.zeros(2, 3, *d, dtype=torch.float64) for d in ((8, 12), (8,), ()))
        h = mlstm_step(*one[:3], *gates, state, backend="torch", **options)
        states.append((h, *state))
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_output_gate_of_the_norm(kind):
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
