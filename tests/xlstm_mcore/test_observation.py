"""What is told of a cell: its gates, state and normaliser, against the cells' own equations."""

import pytest
import torch

from xlstm_kernels import mlstm_chunkwise, slstm_scan, slstm_step
from xlstm_mcore.mixers.observation import of_mlstm, of_slstm


def mlstm_inputs():
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, 9, 4, generator=rng, dtype=torch.float64)
    v = torch.randn(2, 3, 9, 5, generator=rng, dtype=torch.float64)
    igate, fgate = torch.randn(2, 2, 3, 9, generator=rng, dtype=torch.float64)
    return q, k, v, 4 * igate - 2, 3 * fgate + 2


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_the_normaliser_of_the_mlstm_is_what_its_output_is_divided_by(gate):
    inputs = mlstm_inputs()
    options = {"gate": gate, "eps": 0.0, "return_last_state": True}
    h, state = mlstm_chunkwise(*inputs, **options)
    numerator, _ = mlstm_chunkwise(*inputs, **options, normalize=False)
    found = of_mlstm(inputs[3], inputs[4], inputs[0], state, row_ends=True, normalize=True)
    divisor = (numerator / h)[:, :, -1].mean(-1)  # in units of exp(m)
    torch.testing.assert_close(found.normalizer, state[2] + divisor.log())
    assert (found.normalizer >= 0).all() and (found.normalizer == 0).any()
    size = (state[2].exp()[..., None, None] * state[0]).flatten(2).norm(dim=-1)
    torch.testing.assert_close(found.state, size.log())


def test_an_mlstm_in_the_middle_of_a_row_tells_its_gates_alone():
    q, k, v, igate, fgate = mlstm_inputs()
    _, state = mlstm_chunkwise(q, k, v, igate, fgate, return_last_state=True)
    found = of_mlstm(igate, fgate, q, state, row_ends=False, normalize=True)
    assert found.state is found.normalizer is None and found.igate is igate
    bare = of_mlstm(igate, fgate, q, state, row_ends=True, normalize=False)
    assert bare.normalizer is None and bare.state is not None


def test_gates_of_the_slstm_see_the_token_before_within_a_document():
    rng = torch.Generator().manual_seed(1)
    preacts = torch.randn(2, 7, 4, 2, 3, generator=rng)
    weight, bias = torch.randn(4, 2, 3, 3, generator=rng), torch.randn(4, 2, 3, generator=rng)
    boundaries = torch.zeros(2, 7, dtype=torch.bool)
    boundaries[0, 3] = boundaries[1, 6] = True
    h, state = slstm_scan(preacts, weight, bias, boundaries=boundaries, return_last_state=True)
    found = of_slstm(preacts, weight, bias, h, state, boundaries)
    for row in range(2):
        one = [torch.zeros(1, 2, 3) for _ in range(4)]
        for t in range(7):
            if boundaries[row, t]:
                one = [torch.zeros(1, 2, 3) for _ in range(4)]
            seen = torch.einsum("hd,ghde->ghe", one[0][0], weight) + preacts[row, t] + bias
            torch.testing.assert_close(found.igate[row, t], seen[0])
            torch.testing.assert_close(found.fgate[row, t], seen[1])
            slstm_step(preacts[row : row + 1, t], weight, bias, tuple(one))
        _, c, n, m = (part[0].double() for part in one)
        close = {"rtol": 1e-5, "atol": 1e-5}  # of fp32 states
        torch.testing.assert_close(found.state[row], (m.exp() * c).norm(dim=-1).log(), **close)
        torch.testing.assert_close(found.normalizer[row], m + n.log(), **close)
