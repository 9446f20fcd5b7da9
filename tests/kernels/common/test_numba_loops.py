"""The compiled CPU loops against PyTorch in float64; those of the sLSTM have tests of their own."""

import pytest
import torch

from tests.kernels.comparison import assert_float32_close
from xlstm_kernels import (
    causal_conv1d,
    gated_activation,
    gated_skip,
    multihead_norm,
    qkv_and_gates,
    softmax_gradient,
    softmax_statistics,
)
from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.common.numba import tasks

pytest.importorskip("numba", reason="the extra cpu (numba) is not installed")


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def loss_parts(logits, labels, grad, cap, backend):
    """What both functions say, as a loss over this part of the vocabulary would use them."""
    shift, total, chosen = softmax_statistics(logits, labels, cap, backend=backend)
    log_total = total.log() + shift
    d = softmax_gradient(logits.clone(), labels, log_total, grad, cap, backend=backend)
    return log_total, chosen, d


@pytest.mark.parametrize("cap", [None, 30.0, 0.5, 100.0])
@pytest.mark.parametrize("width", [16, 48, 4096])
def test_loss_values_and_gradients(width, cap):
    torch.manual_seed(0)
    logits, labels, grad = 8 * torch.randn(9, width), torch.randint(0, width, (9,)), torch.randn(9)
    labels[:3] = torch.tensor([-1, width, 10 * width])
    exact = loss_parts(logits.double(), labels, grad.double(), cap, "torch")
    got = loss_parts(logits, labels, grad, cap, "numba")
    for one, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=2e-6)


def test_small_logits_keep_their_relative_precision():
    """A soft cap that takes tanh from an exponential near 1 would lose it."""
    logits = torch.linspace(-1e-3, 1e-3, 16)[None]
    label = torch.tensor([5])
    one = softmax_statistics(logits, label, 30.0, backend="numba")[1]
    exact = (30 * torch.tanh(logits.double() / 30)).exp().sum(1)
    assert abs(one.double() - exact) < 2e-6
    d = softmax_gradient(
        logits.clone(), torch.tensor([-1]), torch.zeros(1), torch.ones(1), 30.0, backend="numba"
    )
    expected = (30 * torch.tanh(logits.double() / 30)).exp()
    torch.testing.assert_close(d.double(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("cap", [None, 30.0])
def test_logits_that_exp_cannot_take_and_those_that_are_no_numbers(cap):
    logits = torch.zeros(6, 16)
    logits[0, :2], logits[1] = torch.tensor([1e4, -1e4]), -3e38
    logits[2, :3], logits[3, 7] = torch.tensor([88.0, 89.0, 90.0]), torch.nan
    logits[4, 3] = -torch.inf
    logits.view(torch.int32)[5, 7] = 0x7FFFFFFF  # the NaN that a GPU writes
    labels, grad = torch.tensor([1, 0, 2, 0, 0, 0]), torch.ones(6)
    exact = loss_parts(logits.double(), labels, grad.double(), cap, "torch")
    for one, expected in zip(loss_parts(logits, labels, grad, cap, "numba"), exact, strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_part_of_wider_rows_of_logits_is_written_in_place():
    torch.manual_seed(0)
    logits, labels, grad = torch.randn(8, 48), torch.randint(0, 32, (8,)), torch.randn(8)
    part, rest = logits[:, :32], logits[:, 32:].clone()
    exact = loss_parts(part.double(), labels, grad.double(), 30.0, "torch")
    d = softmax_gradient(part, labels, exact[0].float(), grad, 30.0, backend="numba")
    assert d.data_ptr() == logits.data_ptr() and torch.equal(logits[:, 32:], rest)
    torch.testing.assert_close(d.double(), exact[2], rtol=1e-5, atol=1e-6)


def test_columns_of_logits_that_lie_apart_are_refused():
    logits, labels = torch.randn(16, 4).t(), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="side by side"):
        softmax_statistics(logits, labels, None, backend="numba")
    with pytest.raises(ValueError, match="side by side"):
        softmax_gradient(logits, labels, logits[:, 0], logits[:, 0], None, backend="numba")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_and_gates_may_have_another_type_than_the_input(dtype):
    torch.manual_seed(0)
    x, like_x = torch.randn(2, 8, 16), (2, 8, 16)
    shapes = (128,), like_x, (16,), like_x, like_x, like_x, (12, 4, 4), (2, 48)
    given = [torch.randn(shape).to(dtype) for shape in shapes]

    def run(given):
        weight, gate, skip, beside, opening, convolved, blocks, gates = leaves = [
            one.clone().requires_grad_() for one in given
        ]
        outputs = (
            multihead_norm(x, weight, "rmsnorm", 1e-6, gate=gate, backend="numba"),
            gated_skip(x, skip, beside, opening, backend="numba"),
            *qkv_and_gates(convolved, x, blocks, gates, 1, backend="numba"),
        )
        return outputs, torch.autograd.grad(sum(one.sum() for one in outputs), leaves)

    (outputs, grads), (expected, expected_grads) = run(given), run([one.float() for one in given])
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
    for grad, other in zip(grads, expected_grads, strict=True):
        assert torch.equal(grad, other.to(dtype))


def test_gradients_of_tokens_that_lie_side_by_side():
    torch.manual_seed(0)
    blocks, gates = torch.randn(12, 4, 4), torch.randn(2, 48)
    turned = [torch.randn(1, 16, 8).transpose(1, 2) for _ in range(2)]
    found = []
    for leaves in (turned, [one.contiguous() for one in turned]):
        leaves = [one.detach().requires_grad_() for one in leaves]
        outputs = qkv_and_gates(*leaves, blocks, gates, 1, backend="numba")
        found.append(torch.autograd.grad(sum(one.square().sum() for one in outputs), leaves))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e-3])
def test_swiglu_values_and_gradients(scale):
    torch.manual_seed(0)

    def function(x, backend):
        return {"y": gated_activation(x["x"], "silu", backend=backend)}

    inputs = {"x": scale * torch.randn(3, 5, 96)}
    assert_float32_close(lambda x: function(x, "numba"), lambda x: function(x, "torch"), inputs)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(2, 16), (7, 1, 48), (5, 3, 2, 32), (2, 2, 3, 2, 16)], ids=str)
def test_norm_values_and_gradients(kind, gated, shape):
    torch.manual_seed(0)
    inputs = {"x": 2 * torch.randn(shape) + 1, "w": torch.rand(shape[-2] * shape[-1])}
    if gated:
        inputs["gate"] = 3 * torch.randn(shape)

    def function(x, backend):
        gate = x.get("gate")
        return {"y": multihead_norm(x["x"], x["w"], kind, 1e-6, gate=gate, backend=backend)}

    assert_float32_close(lambda x: function(x, "numba"), lambda x: function(x, "torch"), inputs)


def test_norm_reads_heads_that_lie_apart():
    torch.manual_seed(0)
    h, gate = (torch.randn(3, 2, 5, 32, requires_grad=True) for _ in range(2))
    weight = torch.rand(64, requires_grad=True)
    d = torch.randn(2, 3, 5, 32).permute(2, 1, 0, 3)
    found = []
    for backend in ("numba", "torch"):
        x, g = h.permute(2, 0, 1, 3), gate.permute(2, 0, 1, 3)
        y = multihead_norm(x, weight, "layernorm", 1e-6, gate=g, backend=backend)
        found.append([y, *torch.autograd.grad(y, (h, gate, weight), d)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout, width", [("heads last", 32), ("row", 16), ("by head", 48)])
def test_norm_takes_every_layout(layout, width):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 16, requires_grad=True)
    weight = torch.rand(width, requires_grad=True)
    found = []
    for backend in ("numba", "torch"):
        y = multihead_norm(x, weight, "rmsnorm", 1e-6, layout=layout, backend=backend)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, weight))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("shape", [(1, 1, 16, 4), (2, 3, 16, 4), (3, 9, 144, 4), (2, 7, 32, 1)])
@pytest.mark.parametrize("bounded", [False, True])
def test_conv_values_and_gradients(shape, activation, bounded):
    torch.manual_seed(0)
    b, s, c, taps = shape
    inputs = {"x": torch.randn(b, s, c), "w": torch.randn(c, taps)}
    if bounded:
        inputs["bias"] = torch.randn(c)
    options = {"activation": activation, "boundaries": torch.rand(b, s) < 0.4 if bounded else None}
    options["return_last_state"] = True

    def function(x, backend):
        y, state = causal_conv1d(x["x"], x["w"], x.get("bias"), **options, backend=backend)
        return {"y": y, "state": state} if taps > 1 else {"y": y}

    assert_float32_close(lambda x: function(x, "numba"), lambda x: function(x, "torch"), inputs)


def test_conv_reads_channels_beside_others():
    torch.manual_seed(0)
    packed, weight = torch.randn(5, 2, 64), torch.randn(32, 4)
    leaf = packed.requires_grad_()
    found = []
    for backend in ("numba", "torch"):
        x = leaf.transpose(0, 1).chunk(2, dim=-1)[1]
        y = causal_conv1d(x, weight, activation="silu", backend=backend)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaf)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sizes", "gates"), [((1, 4, 1, 16), 2), ((3, 12, 2, 48), 4)], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_values_and_gradients_of_a_classic_blocks_q_k_v_and_gates(sizes, gates, batch_first):
    """With inputs that lie as the in-projection leaves them, or the batch first."""
    torch.manual_seed(0)
    b, s, heads, d = sizes
    inner = heads * d
    shape = (b, s, 2 * inner) if batch_first else (s, b, 2 * inner)
    inputs = {"packed": torch.randn(shape), "convolved": torch.randn(shape)}
    inputs["blocks"] = torch.randn(3 * inner // 4, 4, 4)
    inputs["gate weight"] = torch.randn(gates, 3 * inner) / inner**0.5

    def function(x, backend):
        both = x["convolved"][..., :inner], x["packed"][..., inner:]
        both = both if batch_first else (one.transpose(0, 1) for one in both)
        out = qkv_and_gates(*both, x["blocks"], x["gate weight"], heads, backend=backend)
        return dict(zip(("q", "k", "v", "gates"), out, strict=True))

    assert_float32_close(lambda x: function(x, "numba"), lambda x: function(x, "torch"), inputs)


@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 3, 48), (70, 2, 32)], ids=str)
def test_values_and_gradients_of_a_classic_blocks_skip_and_gate(shape):
    torch.manual_seed(0)
    rows, batch, width = shape
    inputs = {"h": torch.randn(shape), "skip": torch.randn(width)}
    inputs |= {
        "x": torch.randn(batch, rows, width),
        "packed": 3 * torch.randn(rows, batch, 2 * width),
    }

    def function(x, backend):
        gate = x["packed"][..., width:]
        return {"y": gated_skip(x["h"], x["skip"], x["x"].transpose(0, 1), gate, backend=backend)}

    assert_float32_close(lambda x: function(x, "numba"), lambda x: function(x, "torch"), inputs)


def test_tokens_stay_in_the_order_in_which_they_lie():
    """Convolution and norm copy nothing, and what takes their results need not either."""
    packed, weight = torch.randn(6, 2, 64, requires_grad=True), torch.randn(32, 4)
    x = packed.transpose(0, 1)[..., :32]
    y = causal_conv1d(x, weight, activation="silu", backend="numba")
    assert y.transpose(0, 1).is_contiguous()
    (d_x,) = torch.autograd.grad(y.sum(), x)
    assert d_x.transpose(0, 1).is_contiguous()
    h, scale = torch.randn(2, 3, 6, 16, requires_grad=True), torch.ones(48)
    y = multihead_norm(h, scale, "layernorm", 1e-6, layout="by head", backend="numba")
    assert torch.autograd.grad(y.square().sum(), h)[0].is_contiguous()


def test_results_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    x, w = torch.randn(70, 4, 32, requires_grad=True), torch.rand(128, requires_grad=True)
    blocks, gates = torch.randn(24, 4, 4, requires_grad=True), torch.randn(4, 96)
    skip = torch.randn(32, requires_grad=True)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = multihead_norm(x, w, "rmsnorm", 1e-6, backend="numba")
        qkv = qkv_and_gates(x, x, blocks, gates, 2, backend="numba")
        y = (
            y
            + gated_skip(x, skip, x, x, backend="numba")
            + sum(qkv[3].sum() + one.sum() for one in qkv)
        )
        found.append(torch.autograd.grad(y.square().sum(), (x, w, blocks, skip)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_large_tensors_choose_the_loops_and_others_say_why_not():
    like = torch.zeros(1)
    many = tasks.FEWEST_ELEMENTS
    assert select_backend("multihead_norm", None, like, d=64, elements=many) == "numba"
    assert select_backend("multihead_norm", None, like, d=64, elements=many - 1) == "torch"
    assert select_backend("multihead_norm", None, like, d=63, elements=many) == "torch"
    with pytest.raises(ValueError, match="63 numbers are not whole vectors"):
        select_backend("multihead_norm", "numba", like, d=63, elements=many)
    with pytest.raises(ValueError, match="float32"):
        multihead_norm(
            torch.zeros(2, 16).double(), torch.zeros(32), "rmsnorm", 1e-6, backend="numba"
        )
    with pytest.raises(ValueError, match="not gelu"):
        gated_activation(torch.zeros(2, 32), "gelu", backend="numba")
    x, weight, state = torch.zeros(1, 2, 16), torch.zeros(16, 4), torch.zeros(1, 16, 3)
    with pytest.raises(ValueError, match="without a state"):
        causal_conv1d(x, weight, None, state, backend="numba")
    tokens, gates = torch.zeros(1, 8, 16), torch.zeros(2, 48)
    with pytest.raises(ValueError, match="blocks of width 4, not 2"):
        qkv_and_gates(tokens, tokens, torch.zeros(24, 2, 2), gates, 1, backend="numba")
    with pytest.raises(ValueError, match="6 tokens are not a multiple of 4"):
        odd = tokens[:, :6]
        qkv_and_gates(odd, odd, torch.zeros(12, 4, 4), gates, 1, backend="numba")
    with pytest.raises(ValueError, match=r"pass 3 \* 16 / 4 blocks"):
        qkv_and_gates(tokens, tokens, torch.zeros(9, 4, 4), gates, 1)


def test_custom_ops_follow_the_rules_of_torch():
    from xlstm_kernels.conv import numba as conv
    from xlstm_kernels.cross_entropy import numba as loss
    from xlstm_kernels.gated import numba as gated
    from xlstm_kernels.gated import numba_skip
    from xlstm_kernels.norm import numba as norm
    from xlstm_kernels.qkv import numba as qkv

    check, plain = torch.library.opcheck, ("test_schema", "test_faketensor")
    x = torch.randn(3, 2, 2, 16, requires_grad=True)
    weight = torch.rand(32, requires_grad=True)
    check(norm._norm, (x, weight, x.detach(), 1e-6, True))
    check(norm._norm, (x, weight, None, 1e-6, False))
    check(gated.gated_numba, (torch.randn(3, 2, 32, requires_grad=True),))
    row, taps = torch.randn(2, 5, 16, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    check(conv.conv_numba, (row, taps, taps[:, 0].detach(), torch.rand(2, 5) < 0.3, True))
    tokens, skip = torch.randn(3, 4, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    check(numba_skip.gated_skip_numba, (tokens, skip, tokens.detach(), tokens.detach()))
    blocks, gates = torch.randn(12, 4, 4, requires_grad=True), torch.randn(2, 48)
    check(qkv.qkv_and_gates_numba, (tokens, tokens.detach(), blocks, gates, 1))
    logits, labels = torch.randn(4, 16), torch.randint(0, 16, (4,))
    check(loss.statistics_numba, (logits, labels, 30.0, False), test_utils=plain)
    vectors = torch.zeros(4), torch.ones(4)
    check(loss.gradient_numba, (logits, labels, *vectors, 30.0), test_utils=plain)
