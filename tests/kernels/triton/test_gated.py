"""Gated activations on Triton against PyTorch in float64."""

import pytest
import torch

from tests.kernels.comparison import assert_float32_close, relative_error, run
from xlstm_kernels import gated_activation, gated_activation_again
from xlstm_kernels.gated import triton as gated_triton


def make_inputs(*lead, width=20):
    torch.manual_seed(0)
    return {"x": 3 * torch.randn(*lead, 2 * width)}


def gated(x, activation="silu", backend="triton"):
    return {"y": gated_activation(x["x"], activation, backend=backend)}


def in_pytorch(x, **options):
    return gated(x, **options, backend="torch")


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("lead", [(), (1,), (5, 3)], ids=str)
def test_values_and_gradients(lead, activation):
    assert_float32_close(gated, in_pytorch, make_inputs(*lead), activation=activation)


@pytest.mark.parametrize("width", [1, 64, 1024, 1025])
def test_widths_of_one_tile_and_of_several(width):
    assert_float32_close(gated, in_pytorch, make_inputs(2, width=width))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_bfloat16_is_rounded_once(activation):
    x = {name: t.bfloat16() for name, t in make_inputs(40, width=64).items()}
    exact = run(in_pytorch, x, torch.float64, activation=activation)
    got = run(gated, x, torch.bfloat16, activation=activation)
    assert got["y"].dtype == got["d_x"].dtype == torch.bfloat16
    torch.testing.assert_close(got["y"], exact["y"].bfloat16(), rtol=2**-7, atol=1e-6)
    assert relative_error(got["d_x"], exact["d_x"]) < 5e-3


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_large_input_gives_no_nan(activation):
    x = {"x": torch.tensor([[-1e30, -90.0, 0.0, 90.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]])}
    for name, value in run(gated, x, torch.float32, activation=activation).items():
        assert value.isfinite().all(), name


def test_strides_are_made_contiguous():
    x = make_inputs(6, 4)["x"].transpose(0, 1)
    torch.testing.assert_close(gated({"x": x})["y"], in_pytorch({"x": x})["y"])


def test_custom_op_rules():
    x = make_inputs(3)["x"].requires_grad_()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(gated_triton._gated, (x, False), test_utils=tests)
    of_again = torch.ones(3, 20), x.detach(), False
    torch.library.opcheck(gated_triton._again, of_again, test_utils=tests[:2])


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_pass_leaves_the_result_too(activation, dtype):
    """The bits of the two kernels that it stands for; the last tile of a row is not whole."""
    x = make_inputs(3, width=1030)["x"].to(dtype).requires_grad_()
    y = gated_activation(x, activation, backend="triton")
    d_y = torch.randn(y.shape).to(dtype)
    (expected,) = torch.autograd.grad(y, x, d_y)
    assert torch.equal(gated_activation_again(d_y, x.detach(), activation), expected)
    assert torch.equal(d_y, y)
