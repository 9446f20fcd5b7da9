"""Every Triton kernel under the checker: no access out of bounds, no race between programs.

Kernels are reached through the public functions, forward and backward. Fresh memory is NaN here, so
what is read before it was written shows in the results, which must be those of the PyTorch
implementation. The last test holds the kernels that ran against those that are described for
compilation.
"""

from functools import cache
from itertools import product

import pytest
import torch

from benchmarks.kernel_variants import MODULE, TARGETS, find_variants, persistent
from tests.kernels.comparison import relative_error
from tests.kernels.triton.checker import Checker
from tests.kernels.triton.memory_cases import CASES
from xlstm_kernels.common.backends import BACKENDS

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
    assert torch.empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def run(function, inputs, backend):
    """Outputs and gradients of a function of a dict of inputs, as a dict."""
    inputs = {k: x.detach().requires_grad_(x.is_floating_point()) for k, x in inputs.items()}
    outputs = function(inputs, backend)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for name, x in outputs.items():
        if x.requires_grad and name != "m":
            loss = loss + (x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum()
    found = {name: x.detach() for name, x in outputs.items()}
    if torch.is_tensor(loss):
        wanted = [k for k in inputs if k != "m"]
        grads = torch.autograd.grad(loss, [inputs[k] for k in wanted], allow_unused=True)
        found |= {f"d_{k}": g for k, g in zip(wanted, grads, strict=True) if g is not None}
    return found


ALL = [(kernel, name) for kernel, cases in CASES.items() for name in cases]


@cache
def checked(kernel, name):
    """Results of one case on Triton under the checker, and the checker."""
    function, inputs = CASES[kernel][name]
    checker = Checker()
    with checker:
        return run(function, inputs, "triton"), checker


@pytest.mark.parametrize(("kernel", "name"), ALL, ids=[": ".join(one) for one in ALL])
def test_no_fault_and_the_result_of_the_pytorch_implementation(kernel, name):
    got, checker = checked(kernel, name)
    assert checker.kernels, "nothing ran on Triton"
    function, inputs = CASES[kernel][name]
    expected = run(function, inputs, "torch")
    assert got.keys() == expected.keys()
    dtype = next(iter(inputs.values())).dtype
    for key, value in expected.items():
        error = relative_error(got[key], value)
        assert error <= LIMITS[dtype], f"{key}: {error:.1e}"


def test_every_function_with_a_triton_backend_is_here():
    on_triton = {
        kernel for kernel, backends in BACKENDS.items() if "triton" in {b.name for b in backends}
    }
    assert on_triton == set(CASES)


def test_every_kernel_that_is_compiled_was_checked():
    ran = set().union(*(checked(*one)[1].kernels for one in ALL))
    modules = MODULE, persistent.__name__
    described = {
        variant.fn.__name__
        for target, module in product(TARGETS, modules)
        for variant in find_variants(target, module)
    }
    assert described <= ran, f"no case runs {', '.join(sorted(described - ran))}"
