"""The per-head norm on Triton against its PyTorch implementation in float64."""

import pytest
import torch

from tests.kernels.comparison import assert_float32_close, relative_error, run
from xlstm_kernels import add_norm, multihead_norm, multihead_norm_again, norm_beside
from xlstm_kernels.norm import triton as norm_triton


def make_inputs(*lead, heads=2, d=20, gated=True):
    torch.manual_seed(0)
    x = {"x": torch.randn(*lead, heads, d) + 0.3, "weight": torch.randn(heads * d)}
    if gated:
        x["gate"] = 3 * torch.randn(*lead, heads, d)
    return x


def norm(x, kind="layernorm", eps=1e-5, backend="triton"):
    return {"y": multihead_norm(**x, kind=kind, eps=eps, backend=backend)}


def in_pytorch(x, **options):
    return norm(x, **options, backend="torch")


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("lead", [(), (5,), (3, 4), (2, 1, 3)], ids=str)
def test_values_and_gradients(lead, gated, kind):
    assert_float32_close(norm, in_pytorch, make_inputs(*lead, gated=gated), kind=kind)


@pytest.mark.parametrize("d", [1, 16, 192, 512, 1000, 4096])
def test_head_dimensions(d):
    assert_float32_close(norm, in_pytorch, make_inputs(3, heads=1, d=d), kind="rmsnorm")


def test_a_program_takes_several_blocks_of_rows(monkeypatch):
    """And the last block is not whole."""
    monkeypatch.setattr(norm_triton, "PROGRAMS", 4)  # two for each head
    x = make_inputs(150, d=60)
    assert 150 > 2 * 2 * norm_triton.tile_of(60)["ROWS"]
    assert_float32_close(norm, in_pytorch, x)


def test_strides_of_the_block_are_read_in_place(monkeypatch):
    """[b, heads, s, d] as [s, b, heads, d], and a slice of a product, without a copy."""
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x if x.is_contiguous() else 1 / 0)
    whole = make_inputs(3, 5, heads=4, d=16)

    def strided(x, **options):
        x = dict(x)
        x["x"] = x["x"].permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format)
        x["x"] = x["x"].permute(2, 0, 1, 3)
        x["gate"] = torch.cat([x["gate"], x["gate"]], 2)[:, :, 4:]
        y = norm(x, **options)["y"]
        assert y.is_contiguous() and not x["x"].is_contiguous() and not x["gate"].is_contiguous()
        return {"y": y.permute(1, 0, 2, 3)}  # and its gradient has strides too

    def expected(x, **options):
        return {"y": in_pytorch(x, **options)["y"].permute(1, 0, 2, 3)}

    assert_float32_close(strided, expected, whole)


@pytest.mark.parametrize("layout", ["row", "by head"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_other_layouts(layout, gated):
    """In place of a view of each tensor: a row is one head, and cells return heads before time."""
    by_head = layout == "by head"
    x = make_inputs(3, 4 if by_head else 1, heads=5 if by_head else 1, d=16, gated=gated)
    x["weight"] = torch.randn(64 if by_head else 16)
    if not by_head:
        x |= {name: t.squeeze(-2) for name, t in x.items() if name != "weight"}

    def plainly(x, **options):
        order = (lambda t: t.permute(2, 0, 1, 3)) if by_head else (lambda t: t.unsqueeze(-2))
        x = {name: t if name == "weight" else order(t) for name, t in x.items()}
        y = in_pytorch(x, **options)["y"]
        return {"y": y.reshape(15, 64) if by_head else y.squeeze(-2)}

    for backend in ("triton", "torch"):

        def laid_out(x, backend=backend, **options):
            return {"y": multihead_norm(**x, eps=1e-5, layout=layout, backend=backend, **options)}

        assert_float32_close(laid_out, plainly, x, kind="layernorm")


def test_offsets_beyond_32_bits():
    """Rows more than 2^31 elements apart: most of this memory is never touched."""
    x = torch.empty(2**31 + 64).as_strided((2, 1, 2, 8), (2**31, 0, 8, 1))
    x.copy_(torch.randn(2, 1, 2, 8))
    weight, upstream = torch.randn(16), torch.randn(2, 1, 2, 8)
    results = []
    for one, backend in ((x, "triton"), (x.clone(), "torch")):
        one = one.detach().requires_grad_()
        y = multihead_norm(one, weight, "layernorm", 1e-5, gate=one, backend=backend)
        results.append((y, *torch.autograd.grad(y, one, upstream)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e15])
def test_finite_input_never_gives_nan(size):
    x = make_inputs(4)
    x["x"] = x["x"] * size
    x["gate"] = x["gate"] * 1e30
    for name, value in run(norm, x, torch.float32).items():
        assert value.isfinite().all(), name


def test_bfloat16():
    x = {name: t.bfloat16() for name, t in make_inputs(40, d=64).items()}
    exact, got = run(in_pytorch, x, torch.float64), run(norm, x, torch.bfloat16)
    assert got["y"].dtype == got["d_gate"].dtype == torch.bfloat16
    for name, reference in exact.items():
        assert relative_error(got[name], reference) < 1e-2, name


def test_custom_op_rules_and_autocast():
    x = {name: t.requires_grad_() for name, t in make_inputs(3, 2).items()}
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for gate in (x["gate"], None):
        arguments = (x["x"], x["weight"], gate, 1e-5, True, "heads last")
        torch.library.opcheck(norm_triton.norm_op, arguments, test_utils=tests)
    rows = torch.randn(2, 3, 2, 20)
    of_again = torch.randn(4, 60), rows, torch.randn(60), rows, 1e-5, True
    torch.library.opcheck(norm_triton._again, of_again, test_utils=tests[:2])
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)["y"]
    assert y.dtype == torch.float32 and torch.equal(y, norm(x)["y"])


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_pass_leaves_the_norm_too(kind, dtype):
    """The bits of the two kernels that it stands for, on strides of the 7B-style block."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 70, 20).to(dtype).requires_grad_()
    gate = torch.randn(70, 2, 6, 20).to(dtype)[:, :, 3:].permute(1, 2, 0, 3).requires_grad_()
    weight = torch.randn(60, requires_grad=True)
    y = multihead_norm(x, weight, kind, 1e-5, gate=gate, layout="by head", backend="triton")
    d_y = torch.randn(y.shape).to(dtype)
    expected = torch.autograd.grad(y, (x, weight, gate), d_y)
    given = (t.detach() for t in (x, weight))
    got = multihead_norm_again(d_y, *given, kind, 1e-5, gate.detach())
    for one, other in zip((d_y, *got), (y, *expected), strict=True):
        assert torch.equal(one, other)


def test_large_heads_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"4097 exceeds 4096; use more heads, or 'torch'"):
        norm(make_inputs(1, heads=1, d=4097))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_residual_sum_and_its_norm_are_those_of_two_kernels_bit_by_bit(dtype):
    torch.manual_seed(0)
    x, added = torch.randn(2, 7, 3, 40).to(dtype)
    weight = torch.randn(40)
    total, y = add_norm(x, added, weight, "rmsnorm", 1e-5, backend="triton")
    assert torch.equal(total, x + added)
    alone = multihead_norm(total, weight, "rmsnorm", 1e-5, layout="row", backend="triton")
    assert torch.equal(y, alone)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_gradients_of_a_residual_sum(kind):
    """Both results are used, as in a block; the last tile of rows is not whole."""
    torch.manual_seed(0)
    inputs = {"x": torch.randn(150, 60), "added": torch.randn(150, 60), "weight": torch.randn(60)}

    def call(x, backend="triton"):
        both = add_norm(**x, kind=kind, eps=1e-5, backend=backend)
        return dict(zip(("total", "y"), both, strict=True))

    assert_float32_close(call, lambda x: call(x, "torch"), inputs)


@pytest.mark.parametrize("used", ["both", "norm", "stream"])
def test_gradients_of_what_goes_on_beside_its_norm(used):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(150, 60), "weight": torch.randn(60)}

    def call(x, backend="triton"):
        both = norm_beside(**x, kind="rmsnorm", eps=1e-5, backend=backend)
        results = dict(zip(("stream", "norm"), both, strict=True))
        unused = {name: t * 0 for name, t in x.items() if used == "stream" and name == "weight"}
        return (results if used == "both" else {used: results[used]}) | unused

    assert_float32_close(call, lambda x: call(x, "torch"), inputs)
