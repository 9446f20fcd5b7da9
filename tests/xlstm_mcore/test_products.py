"""Products of narrow operands with fp32 results, and weight gradients that go into fp32 buffers."""

from contextlib import nullcontext

import pytest
import torch

from xlstm_kernels.common.products import narrow_product
from xlstm_mcore.build import make_config
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.megatron import cpu_runtime
from xlstm_mcore.modules.linear import input_projection
from xlstm_mcore.modules.products import add_product, local_product
from xlstm_mcore.parallel.tensor import TensorParallelRegion
from xlstm_mcore.recompute import selective


@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrices", "batches"])
def test_a_narrow_product_and_its_gradients(lead):
    """Against fp64; the gradient that is not narrow keeps sixteen bits."""
    a = torch.randn(*lead, 40, 24).bfloat16().requires_grad_()
    b = torch.randn(*lead, 24, 6).bfloat16().requires_grad_()
    d = torch.randn(*lead, 40, 6)
    found = narrow_product(a, b)
    assert found.dtype == torch.float32
    found.backward(d)
    wide = [x.detach().double().requires_grad_() for x in (a, b)]
    expected = wide[0] @ wide[1]
    expected.backward(d.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for leaf, exact in zip((a, b), wide, strict=True):
        assert leaf.grad.dtype == torch.bfloat16
        # One rounding to bf16: half a unit in the last of its eight bits.
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2**-8, atol=1e-4)


def test_wide_products_stay_what_they_were():
    a, b = torch.randn(5, 4), torch.randn(4, 3)
    assert torch.equal(narrow_product(a, b), a @ b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added_in_fp32(dtype):
    target = torch.randn(4, 3)
    a, b = torch.randn(4, 9).to(dtype), torch.randn(9, 3).to(dtype)
    expected = target.double() + a.double() @ b.double()
    add_product(target, a, b)
    torch.testing.assert_close(target.double(), expected, rtol=1e-6, atol=1e-6)


def test_on_a_device_nothing_is_widened_or_kept():
    target = torch.empty(4, 3, device="meta")
    a, b = (torch.empty(*n, dtype=torch.bfloat16, device="meta") for n in [(4, 9), (9, 3)])
    add_product(target, a, b)


@pytest.mark.parametrize("recompute", [nullcontext, selective])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_linear_layer_adds_its_weight_gradient_to_the_buffer(precision, recompute):
    """Autograd has a gradient for DDP's hook too, which refuses none, and it is not to be added."""
    groups = single_process_groups()
    cpu_runtime.activate()
    model = {"pattern": "M", "hidden_size": 32, "num_heads": 2, "vocab_size": 64}
    config = make_config(model, precision=precision, fuses_weight_gradients=True)
    linear = input_projection(config, TensorParallelRegion(config, groups.tp), {"w": 16})
    weight = linear.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape))
    weight.main_grad = torch.ones(weight.shape)
    weight.grad_added_to_main_grad = False
    x = torch.randn(5, 2, 32).to(weight.dtype).requires_grad_()
    d = torch.randn(5, 2, 16).to(weight.dtype)
    with recompute():
        out = linear(x)[0]
    out.backward(d)
    expected = 1 + d.flatten(0, 1).double().t() @ x.detach().flatten(0, 1).double()
    assert weight.grad_added_to_main_grad and weight.grad is not None
    torch.testing.assert_close(weight.main_grad.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        x.grad.double(), (d.double() @ weight.double()), rtol=2e-2, atol=5e-2
    )


def test_what_autograd_has_of_a_tied_weight_is_zero():
    """DDP's hook adds it to the buffer: the lookup's gradient is summed there."""
    weight = torch.nn.Parameter(torch.randn(3, 4))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(3, 4), False
    weight.zero_out_wgrad = True
    x, d = torch.randn(5, 4), torch.randn(5, 3)
    local_product(x, weight, True).backward(d)
    assert weight.grad_added_to_main_grad and not weight.grad.any()
    torch.testing.assert_close(weight.main_grad, d.t() @ x)
