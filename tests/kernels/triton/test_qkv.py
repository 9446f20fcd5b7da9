"""q, k, v and gates of the classic mLSTM on Triton against PyTorch in float64."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.comparison import assert_float32_close, relative_error, run
from xlstm_kernels import conv_qkv_and_gates, qkv_and_gates
from xlstm_kernels.qkv import triton as qkv_triton


def make_inputs(b, s, head_dim=16, gates=8, block=4):
    torch.manual_seed(0)
    inner = 3 * head_dim
    return {
        "convolved": torch.randn(b, s, inner),
        "x": torch.randn(b, s, 2 * inner),  # the kernel reads the half that it needs
        "blocks": torch.randn(3 * inner // block, block, block),
        "gate_weight": torch.randn(gates, 3 * inner),
    }


def heads(x, backend="triton"):
    half = x["x"][..., : x["convolved"].shape[2]]
    inputs = x["convolved"], half, x["blocks"], x["gate_weight"]
    results = qkv_and_gates(*inputs, 3, backend=backend)
    return dict(zip(("q", "k", "v", "gates"), results, strict=True))


def in_pytorch(x):
    return heads(x, "torch")


@pytest.mark.parametrize("shape", [(1, 1), (3, 11), (2, 16), (1, 65)], ids=str)
@pytest.mark.parametrize(("head_dim", "block", "gates"), [(16, 4, 1), (64, 4, 8), (16, 16, 17)])
def test_values_and_gradients(shape, head_dim, block, gates):
    assert_float32_close(heads, in_pytorch, make_inputs(*shape, head_dim, gates, block))


def test_tokens_are_dealt_out_to_programs(monkeypatch):
    monkeypatch.setattr(qkv_triton, "PROGRAMS", 6)  # two for each tile of channels
    assert_float32_close(heads, in_pytorch, make_inputs(1, 5 * qkv_triton.TOKENS[1] - 1))


def test_bfloat16_is_as_exact_as_in_pytorch():
    """The gates see q, k and v rounded, as the cell does; their sums and gradients do not round."""
    x = {name: t.bfloat16() for name, t in make_inputs(2, 100, 32).items()}
    exact = run(in_pytorch, x, torch.float64)
    got, plain = run(heads, x, torch.bfloat16), run(in_pytorch, x, torch.bfloat16)
    assert got["gates"].dtype == torch.float32 and got["q"].dtype == torch.bfloat16
    for name, reference in exact.items():
        error = relative_error(got[name], reference)
        assert error <= 1.2 * relative_error(plain[name], reference) + 1e-6, name


def test_tokens_with_the_sequence_first_are_read_in_place(monkeypatch):
    """And so do the results lie. Only weights are put in order."""
    x = make_inputs(2, 10)
    for name in ("convolved", "x"):
        x[name] = x[name].transpose(0, 1).clone(memory_format=torch.contiguous_format)
        x[name] = x[name].transpose(0, 1)
    as_it_was = torch.Tensor.contiguous

    def seen(t):
        assert t.is_contiguous() or t.shape[0] == 3, "tokens were copied"
        return as_it_was(t)

    monkeypatch.setattr(torch.Tensor, "contiguous", seen)
    assert heads(x)["q"].permute(2, 0, 1, 3).is_contiguous()


def test_one_result_alone_has_a_gradient():
    x = {name: t.requires_grad_() for name, t in make_inputs(1, 10).items()}
    got, expected = (
        torch.autograd.grad(call(x)["v"].sum(), x["x"]) for call in (heads, in_pytorch)
    )
    torch.testing.assert_close(got, expected)


def test_custom_op_rules():
    tokens = [torch.randn(3, 32).requires_grad_() for _ in range(2)]
    matrices, weight = torch.randn(3, 2, 16, 16), torch.randn(3, 32, 4)
    inputs = (*tokens, matrices.requires_grad_(), weight.requires_grad_())
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(qkv_triton.project, inputs, test_utils=tests)


def test_tiles_that_cannot_run_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="blocks of 4 in heads of 24 make tiles of 8, and the"):
        heads(make_inputs(1, 3, head_dim=24))


CONVOLVED = "convolved", "beside", "q", "k", "v", "gates"


def make_packed(b, s, inner=48, gates=8):
    torch.manual_seed(0)
    return {
        "packed": torch.randn(b, s, 2 * inner),
        "taps": torch.randn(inner, 4),
        "bias": torch.randn(inner),
        "blocks": torch.randn(3 * inner // 4, 4, 4),
        "gate_weight": torch.randn(gates, 3 * inner),
        "before": torch.randn(b, inner, 3),
    }


def convolved(x, backend="triton", **options):
    results = conv_qkv_and_gates(
        *(x[name] for name in ("packed", "taps", "bias", "blocks", "gate_weight")), 3,
        x.get("before"), backend=backend, **options,
    )  # fmt: skip
    return dict(zip(CONVOLVED, results, strict=True))


@pytest.mark.parametrize("carried", [False, True])
def test_with_the_convolution_values_and_gradients(carried):
    x = make_packed(2, 37)
    if not carried:
        del x["before"]
    options = {"boundaries": torch.rand(2, 37) < 0.2}
    assert_float32_close(
        partial(convolved, **options), partial(convolved, backend="torch", **options), x
    )


def test_the_gradient_of_a_projection_is_one_tensor_that_kernels_fill():
    """No sum of two gradients, and of the two halves only one is put beside the other."""
    x = {name: t.requires_grad_() for name, t in make_packed(2, 10).items()}
    projection = x["packed"].detach().transpose(0, 1).contiguous().requires_grad_()
    results = convolved(x | {"packed": projection.transpose(0, 1)})
    seen = Counter()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func._schema.name] += 1
            return func(*args, **(kwargs or {}))

    with Seen():
        (got,) = torch.autograd.grad([t.sum() for t in results.values()], projection)
    assert got.is_contiguous()
    assert not {"aten::add", "aten::cat"} & set(seen)
    assert seen["xlstm_kernels::causal_conv1d_triton_backward"] == 1
