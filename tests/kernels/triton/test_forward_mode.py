"""Forward-mode differentiation of what runs on Triton; see `tests/kernels/test_forward_mode.py`."""

import pytest

from tests.kernels.test_forward_mode import check_forward_mode, pairs


@pytest.mark.parametrize(("name", "backend"), pairs("triton", "persistent"))
def test_a_tangent_raises_or_is_right(name, backend):
    check_forward_mode(name, backend)
