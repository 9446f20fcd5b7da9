"""The soft cap of the gates' pre-activations, in the PyTorch implementation."""

import pytest
import torch

from xlstm_kernels import mlstm_chunkwise, mlstm_step

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
