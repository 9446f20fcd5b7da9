"""The Triton convolution in the interpreter against the PyTorch implementation in float64."""

import pytest
import torch

from tests.kernels.comparison import relative_error
from xlstm_kernels import causal_conv1d
from xlstm_kernels.conv.triton import conv_gradients, conv_triton

torch.set_num_threads(1)
B = 2


def make_inputs(s, c, width, bias=True, state=True):
    torch.manual_seed(s * 100 + c + width)
    inputs = [
        torch.randn(B, s, c),
        torch.randn(c, width),
        torch.randn(c),
        torch.randn(B, c, width - 1),
    ]
    return [inputs[0], inputs[1], inputs[2] if bias else None, inputs[3] if state else None]


def results(inputs, dtype, backend, **options):
    inputs = [None if x is None else x.to(dtype).requires_grad_() for x in inputs]
    y, state = causal_conv1d(*inputs, return_last_state=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, state)]
    loss = (y * weights[0].to(y.dtype)).sum() + (state * weights[1].to(y.dtype)).sum()
    used = [x for x in inputs if x is not None and x.numel()]
    grads = torch.autograd.grad(loss, used, allow_unused=True, materialize_grads=True)
    return [y, state, *grads]


def assert_close(inputs, dtype=torch.float32, limit=2e-6, **options):
    inputs = [None if x is None else x.to(dtype) for x in inputs]
    exact = results(inputs, torch.float64, "torch", **options)
    got = results(inputs, dtype, "triton", **options)
    for a, b in zip(got, exact, strict=True):
        assert a.shape == b.shape
        if a.numel():
            assert relative_error(a, b) < limit


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("s", "c", "width"), [(1, 3, 4), (2, 5, 4), (33, 130, 4), (65, 16, 2), (31, 20, 1)]
)
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
def test_values_state_and_gradients(s, c, width, activation, state):
    inputs = make_inputs(s, c, width, bias=state, state=state)
    assert_close(inputs, activation=activation)
    boundaries = torch.rand(B, s) < 0.2
    assert_close(inputs, activation=activation, boundaries=boundaries)


def test_a_slice_with_the_sequence_first_is_read_in_place(monkeypatch):
    """And what comes of it, and its gradient, lie in the order of its tokens."""
    plain, weight, bias, _ = make_inputs(37, 20, 4)
    upstream = torch.randn_like(plain)
    rest = weight, bias, None, None, True
    expected = conv_triton(plain, *rest), conv_gradients(upstream, plain, *rest, None, None)[0]

    def sequence_first(x):
        return x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)

    def whole(x):
        assert x.ndim < 3 or x.is_contiguous()
        return as_it_was(x)

    x = sequence_first(torch.cat((plain, plain), 2))[..., 20:]
    upstream = sequence_first(upstream)
    as_it_was = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", whole)
    got = conv_triton(x, *rest), conv_gradients(upstream, x, *rest, None, None)[0]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other) and one.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("position", range(6))
def test_boundary_at_every_position(position):
    boundaries = torch.zeros(B, 6, dtype=torch.bool)
    boundaries[0, position] = True
    inputs = make_inputs(6, 3, 4)
    assert_close(inputs, activation="silu", boundaries=boundaries)


def test_every_token_its_own_document():
    assert_close(make_inputs(5, 3, 4), boundaries=torch.ones(B, 5, dtype=torch.bool))


def test_two_segments_are_one_sequence():
    x, weight, bias, state = make_inputs(9, 3, 4)
    options = {"activation": "silu", "backend": "triton"}
    y1, carried = causal_conv1d(x[:, :2], weight, bias, state, return_last_state=True, **options)
    y2 = causal_conv1d(x[:, 2:], weight, bias, carried, **options)
    whole = causal_conv1d(x, weight, bias, state, **options)
    torch.testing.assert_close(torch.cat([y1, y2], 1), whole)


def test_bfloat16_and_strided_inputs():
    inputs = make_inputs(33, 20, 4)
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(inputs, torch.bfloat16, limit=1e-2, activation="silu")


def test_a_bias_with_gaps_is_read_as_it_lies():
    x, weight, bias, _ = make_inputs(5, 3, 4)
    spread = torch.stack((bias, bias + 1), 1)[:, 0]
    rest = None, None, True
    assert torch.equal(conv_triton(x, weight, spread, *rest), conv_triton(x, weight, bias, *rest))
    gaps, plain = (
        conv_gradients(x, x, weight, one, *rest, None, None)[0] for one in (spread, bias)
    )
    assert torch.equal(gaps, plain)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_finite_input_never_gives_nan(size):
    inputs = make_inputs(9, 3, 4)
    inputs[0] *= size
    for x in results(inputs, torch.float32, "triton", activation="silu"):
        assert x.isfinite().all()


def test_custom_ops_follow_the_rules_of_torch():
    x, weight, bias, state = (x.requires_grad_() for x in make_inputs(5, 3, 4))
    boundaries = torch.zeros(B, 5, dtype=torch.bool)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(conv_triton, (x, weight, bias, state, boundaries, True), test_utils=tests)
    torch.library.opcheck(conv_triton, (x, weight, None, None, None, False), test_utils=tests)
    with torch.no_grad():
        tests = ("test_schema", "test_faketensor")
        for rest in ((None, None), (x, x)):
            arguments = (x, x, weight, None, None, None, False, *rest)
            torch.library.opcheck(conv_gradients, arguments, test_utils=tests)


def test_gradients_from_elsewhere_are_added_or_lie_beside():
    x, weight, bias, _ = make_inputs(37, 20, 4)
    upstream, more, beside = torch.randn(3, *x.shape)
    rest = upstream, x, weight, bias, None, None, True
    plain, *of_weights = conv_gradients(*rest, None, None)
    got, *others = conv_gradients(*rest, more, beside)
    torch.testing.assert_close(got, torch.cat((plain + more, beside), 2))
    for one, other in zip(others, of_weights, strict=True):
        assert torch.equal(one, other)
