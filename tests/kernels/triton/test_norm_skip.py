"""The norm with skip and gate of a classic mLSTM block on Triton against PyTorch in float64."""

import pytest
import torch

from tests.kernels.comparison import assert_float32_close, relative_error, run
from xlstm_kernels import norm_gated_skip, norm_gated_skip_again
from xlstm_kernels.norm import skip_triton


def make_inputs(s, b=2, heads=3, d=20):
    torch.manual_seed(0)
    width = heads * d
    x = {"h": torch.randn(b, heads, s, d) + 0.3, "weight": torch.randn(width)}
    x |= {"skip": torch.randn(width), "x": torch.randn(s, b, width)}
    return x | {"gate": 3 * torch.randn(s, b, 2 * width)}  # the kernel reads the half it needs


def joined(x, kind="layernorm", backend="triton"):
    gate = x["gate"][..., x["x"].shape[-1] :]
    inputs = x["h"], x["weight"], kind, 1e-5, x["skip"], x["x"], gate
    return {"y": norm_gated_skip(*inputs, backend=backend)}


def in_pytorch(x, **options):
    return joined(x, **options, backend="torch")


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize(("s", "d"), [(1, 1), (37, 20), (3, 1000)])
def test_values_and_gradients(s, d, kind):
    assert_float32_close(joined, in_pytorch, make_inputs(s, d=d), kind=kind)


def test_a_program_takes_several_blocks_of_rows(monkeypatch):
    """And the last block is not whole."""
    monkeypatch.setattr(skip_triton, "PROGRAMS", 6)  # two for each head
    x = make_inputs(80, d=60)
    assert 160 > 2 * 2 * skip_triton.tile_of(60)["ROWS"]
    assert_float32_close(joined, in_pytorch, x)


def test_tensors_are_read_as_they_lie(monkeypatch):
    """Gradients lie as the projections need them: heads of a token beside each other."""
    x = {name: t.requires_grad_() for name, t in make_inputs(5).items()}
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x if x.is_contiguous() else 1 / 0)
    x["x"] = x["x"].detach().transpose(0, 1).clone().transpose(0, 1).requires_grad_()
    y = joined(x)["y"]
    d_h, d_x = torch.autograd.grad(y, (x["h"], x["x"]), torch.ones_like(y))
    assert y.is_contiguous() and d_x.is_contiguous() and d_h.permute(2, 0, 1, 3).is_contiguous()


def test_bfloat16_rounds_once():
    x = {name: t.bfloat16() for name, t in make_inputs(40, d=64).items()}
    exact, got = run(in_pytorch, x, torch.float64), run(joined, x, torch.bfloat16)
    plain = run(in_pytorch, x, torch.bfloat16)
    for name, reference in exact.items():
        error = relative_error(got[name], reference)
        assert error <= max(relative_error(plain[name], reference), 4e-3), name


def test_the_result_has_the_type_of_h_beside_inputs_of_another():
    x = make_inputs(5)
    mixed = {name: t if name == "h" else t.bfloat16() for name, t in x.items()}
    for one in mixed.values():
        one.requires_grad_()
    got, expected = joined(mixed)["y"], in_pytorch(mixed)["y"]
    assert got.dtype == expected.dtype == torch.float32
    assert relative_error(got, expected.double()) < 1e-2
    leaves = list(mixed.values())
    d_y = torch.randn(got.shape)
    grads = [torch.autograd.grad(y, leaves, d_y) for y in (got, expected)]
    for leaf, ours, theirs in zip(leaves, *grads, strict=True):
        assert ours.dtype == theirs.dtype == leaf.dtype
        assert relative_error(ours, theirs.double()) < 2e-2


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_pass_leaves_the_result_too(kind, dtype):
    """The bits of the two kernels that it stands for."""
    made = make_inputs(37)
    made["gate"] = made["gate"][..., 60:]
    x = {name: t.to(dtype).requires_grad_() for name, t in made.items()}
    order = ("h", "weight", "skip", "x", "gate")
    y = norm_gated_skip(
        x["h"], x["weight"], kind, 1e-5, *(x[n] for n in order[2:]), backend="triton"
    )
    d_y = torch.randn(y.shape).to(dtype)
    expected = torch.autograd.grad(y, [x[name] for name in order], d_y)
    given = {name: t.detach() for name, t in x.items()}
    got = norm_gated_skip_again(
        d_y, given["h"], given["weight"], kind, 1e-5, *(given[name] for name in order[2:])
    )
    for one, other in zip((d_y, *got), (y, *expected), strict=True):
        assert torch.equal(one, other)


def test_custom_op_rules():
    x = make_inputs(3)
    x["gate"] = x["gate"][..., :60]
    order = ("h", "weight", "skip", "x", "gate")
    inputs = tuple(x[name].clone().requires_grad_() for name in order)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(skip_triton._norm_skip, (*inputs, 1e-5, True), test_utils=tests)
    of_again = torch.randn(3, 2, 60), *(t.detach() for t in inputs), 1e-5, True
    torch.library.opcheck(skip_triton._again, of_again, test_utils=tests[:2])


def test_shapes_that_do_not_fit_are_refused():
    x = make_inputs(3)
    x["x"] = x["x"].transpose(0, 1)
    with pytest.raises(ValueError, match=r"x has shape \[2, 3, 60\]"):
        joined(x)
