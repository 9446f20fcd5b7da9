"""A gate that is NaN or infinite shows in the interpreter, which drops NaN as a GPU does."""

import pytest
import torch

from tests.kernels.test_edges import (
    MLSTM_BROKEN,
    SLSTM_BROKEN,
    check_broken_mlstm,
    check_broken_slstm,
)

torch.set_num_threads(1)


@pytest.mark.parametrize(("gate", "name", "value"), MLSTM_BROKEN)
def test_of_the_mlstm(gate, name, value):
    check_broken_mlstm(gate, name, value, "triton")


@pytest.mark.parametrize(("forget_gate", "name", "value"), SLSTM_BROKEN)
def test_of_the_slstm(forget_gate, name, value):
    check_broken_slstm(forget_gate, name, value, "triton")
