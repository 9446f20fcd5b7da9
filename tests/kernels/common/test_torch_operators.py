"""The kernels as operators of torch: compile, FakeTensor, recomputation, autocast, strides.

Every PyTorch implementation, and the sLSTM's compiled CPU loops, run with an initial state and
boundaries. All outputs and gradients are compared with those of a plain call.
"""

import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from xlstm_kernels import (
    causal_conv1d,
    mlstm_chunkwise,
    mlstm_step,
    multihead_norm,
    slstm_scan,
    slstm_step,
)

B, HEADS, S, QK, V = 2, 3, 37, 8, 12


def flat(h, state):
    return h, *state


def mlstm(q, k, v, i, f, C, n, m, boundaries):
    options = {"boundaries": boundaries, "chunk_size": 16, "return_last_state": True}
    return flat(*mlstm_chunkwise(q, k, v, i, f, (C, n, m), **options, backend="torch"))


def mlstm_inputs():
    shapes = [(B, HEADS, S, QK)] * 2 + [(B, HEADS, S, V)] + [(B, HEADS, S)] * 2
    return [torch.randn(x) for x in [*shapes, (B, HEADS, QK, V), (B, HEADS, QK), (B, HEADS)]]


def slstm(x, R, b, h, c, n, m, boundaries, backend="torch"):
    state = h, c, n.abs() + 1, m
    options = {"boundaries": boundaries, "return_last_state": True, "backend": backend}
    return flat(*slstm_scan(x, R, b, state, **options))


def slstm_numba(*inputs):
    return slstm(*inputs, backend="numba")


def slstm_inputs():
    shapes = [(B, S, 4, HEADS, QK), (4, HEADS, QK, QK), (4, HEADS, QK)] + [(B, HEADS, QK)] * 4
    return [torch.randn(shape) * 0.5 for shape in shapes]


def conv(x, weight, bias, state, boundaries):
    options = {"activation": "silu", "boundaries": boundaries, "return_last_state": True}
    return causal_conv1d(x, weight, bias, state, **options, backend="torch")


def conv_inputs():
    return [torch.randn(x) for x in ((B, S, V), (V, 4), (V,), (B, V, 3))]


def norm(x, weight, boundaries):
    return (multihead_norm(x, weight, "layernorm", 1e-6),)


def norm_inputs():
    return [torch.randn(B, S, HEADS, V), torch.randn(HEADS * V)]


CASES = {
    "mlstm": (mlstm, mlstm_inputs),
    "slstm": (slstm, slstm_inputs),
    "slstm numba": (slstm_numba, slstm_inputs),
    "conv": (conv, conv_inputs),
    "norm": (norm, norm_inputs),
}


@pytest.fixture(params=CASES)
def case(request):
    """A function, its inputs (which require gradients) and boundaries."""
    if "numba" in request.param and importlib.util.find_spec("numba") is None:
        pytest.skip("the extra cpu (numba) is not installed")
    function, make = CASES[request.param]
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in make()]
    boundaries = torch.zeros(B, S, dtype=torch.bool)
    boundaries[0, 9] = boundaries[1, 30] = True
    return function, inputs, boundaries


def upstream(outputs):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]


def gradients(outputs, inputs):
    """Of a fixed random combination of all outputs that have a gradient."""
    used = [x for x in outputs if x.requires_grad]
    return torch.autograd.grad(used, inputs, upstream(used), allow_unused=True)


def values_and_gradients(function, inputs, *rest):
    outputs = function(*inputs, *rest)
    return [*outputs, *gradients(outputs, inputs)]


def assert_equal(got, expected):
    """Bit by bit, None where None."""
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


def test_stabilizer_carries_no_gradient(case):
    function, inputs, boundaries = case
    if function in (mlstm, slstm, slstm_numba):
        *others, m = function(*inputs, boundaries)
        assert not m.requires_grad and all(x.requires_grad for x in others)


def test_compiles_as_one_graph(case):
    function, inputs, boundaries = case
    expected = values_and_gradients(function, inputs, boundaries)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal(values_and_gradients(compiled, inputs, boundaries), expected)


def test_fake_tensors_have_the_real_shapes_dtypes_and_strides(case):
    function, inputs, boundaries = case
    for dtype in (torch.float32, torch.bfloat16):
        real = [x.detach().to(dtype).requires_grad_() for x in inputs]
        expected = values_and_gradients(function, real, boundaries)
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(x) for x in real]
            outputs = function(*fake, mode.from_tensor(boundaries))
            weights = [torch.empty_like(x) for x in outputs if x.requires_grad]
            used = [x for x in outputs if x.requires_grad]
            grads = torch.autograd.grad(used, fake, weights, allow_unused=True)
        for x, y in zip([*outputs, *grads], expected, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_identical_gradients(case, reentrant):
    function, inputs, boundaries = case
    expected = values_and_gradients(function, inputs, boundaries)
    outputs = checkpoint(function, *inputs, boundaries, use_reentrant=reentrant)
    used = [x for x in outputs if x.requires_grad]
    torch.autograd.backward(used, upstream(used))
    assert_equal([*outputs, *(x.grad for x in inputs)], expected)


def test_all_that_is_kept_for_the_backward_pass_can_be_recomputed(case):
    """Nothing but the arguments lives on while checkpointing has dropped the saved tensors."""
    function, inputs, boundaries = case
    packed = []

    def pack(x):
        packed.append(x.detach().clone())
        return len(packed) - 1

    expected = values_and_gradients(function, inputs, boundaries)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda at: packed[at]):
        outputs = function(*inputs, boundaries)
    for node in (x.grad_fn for x in outputs if x.requires_grad):
        for kept in getattr(node, "__dict__", {}).values():
            kept = kept if isinstance(kept, (tuple, list)) else [kept]
            assert not any(isinstance(x, torch.Tensor) for x in kept)
    assert_equal([*outputs, *gradients(outputs, inputs)], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(case, dtype):
    """Results are those of the dtypes of the arguments, in both passes."""
    function, inputs, boundaries = case
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    expected = values_and_gradients(function, inputs, boundaries)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = function(*inputs, boundaries)
        inside = gradients(outputs, inputs)
    assert_equal([*outputs, *inside], expected)


def test_autocast_changes_no_step():
    torch.manual_seed(0)
    one = [x[:, :, 0] for x in mlstm_inputs()[:5]]
    states = [[torch.randn(B, HEADS, *d) for d in ((QK, V), (QK,), ())]]
    states.append([x.clone() for x in states[0]])
    plain = mlstm_step(*one, tuple(states[0]), backend="torch")
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal([mlstm_step(*one, tuple(states[1]), backend="torch")], [plain])
    assert_equal(states[1], states[0])
    x, R, b = slstm_inputs()[:3]
    states = [[torch.rand(B, HEADS, QK) for _ in range(4)]]
    states.append([x.clone() for x in states[0]])
    plain = slstm_step(x[:, 0], R, b, tuple(states[0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal([slstm_step(x[:, 0], R, b, tuple(states[1]))], [plain])
    assert_equal(states[1], states[0])


def test_repeats_itself_and_reads_no_memory_that_it_has_not_written(case, deterministic):
    function, inputs, boundaries = case
    torch.utils.deterministic.fill_uninitialized_memory = False
    expected = values_and_gradients(function, inputs, boundaries)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    assert_equal(values_and_gradients(function, inputs, boundaries), expected)


def test_deterministic_mode_keeps_off_what_cuda_refuses_then(case, request, monkeypatch):
    function, inputs, boundaries = case
    expected = values_and_gradients(function, inputs, boundaries)
    cumsum = torch.Tensor.cumsum

    def integers_only(x, *arguments, **options):
        assert not x.is_floating_point(), "cumsum of floats raises on CUDA in deterministic mode"
        return cumsum(x, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "cumsum", integers_only)
    request.getfixturevalue("deterministic")
    got = values_and_gradients(function, inputs, boundaries)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_strided_inputs_and_gradients(case):
    function, inputs, boundaries = case
    expected = values_and_gradients(function, inputs, boundaries)
    strided = [
        x.detach().movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_() for x in inputs
    ]
    got = values_and_gradients(function, strided, boundaries)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    used = [x for x in function(*inputs, boundaries) if x.requires_grad]
    spread = [torch.ones(()).expand(x.shape) for x in used]  # as x.sum() gives
    a, b = (
        torch.autograd.grad(used, inputs, ones, allow_unused=True, retain_graph=True)
        for ones in (spread, [x.contiguous() for x in spread])
    )
    assert_equal(a, b)


def test_custom_ops_follow_the_rules_of_torch():
    """Schema, fake results, registered gradients and AOTAutograd with dynamic shapes."""
    from xlstm_kernels.conv import conv as conv_module
    from xlstm_kernels.mlstm.torch import chunkwise as chunkwise_torch
    from xlstm_kernels.slstm.torch import scan as scan_torch

    torch.manual_seed(0)
    boundaries = torch.rand(B, S) < 0.1
    x = [x.requires_grad_() for x in mlstm_inputs()]
    check, forward = torch.library.opcheck, chunkwise_torch.mlstm_forward
    check(forward, (*x[:7], x[7].detach(), boundaries, 16, True, False, True, True, 1e-6))
    half = [x.detach().bfloat16().requires_grad_() for x in x[:5]]
    check(forward, (*half, *[None] * 4, 16, False, True, False, False, 1e-6))
    x = [x.requires_grad_() for x in slstm_inputs()]
    check(scan_torch.scan_forward, (*x[:6], x[6].detach(), boundaries, True, "slstm"))
    check(scan_torch.scan_forward, (x[0].bfloat16(), *x[1:3], *[None] * 5, False, "slstm"))
    x, weight, bias, _ = (x.requires_grad_() for x in conv_inputs())
    document = torch.zeros(B, S, dtype=torch.long)
    check(conv_module.conv_taps, (x, weight, bias, document))
    check(conv_module.conv_taps, (x.bfloat16(), weight, None, None))
