"""Sums over logits and their gradient on Triton against PyTorch in float64."""

import pytest
import torch

from xlstm_kernels import softmax_gradient, softmax_statistics
from xlstm_kernels.cross_entropy import triton as cross_entropy_triton


def make_inputs(rows, width, scale=8.0, dtype=torch.float32):
    torch.manual_seed(0)
    logits = (scale * torch.randn(rows, width)).to(dtype)
    labels = torch.randint(0, width, (rows,))
    labels[: rows // 3] = torch.tensor([-1, width, 10 * width])[: rows // 3]
    return logits, labels, torch.randn(rows)


def both(logits, labels, grad, cap, backend):
    """What both functions say, as a loss over this part of the vocabulary would use them."""
    shift, total, chosen = softmax_statistics(logits, labels, cap, backend=backend)
    log_total = total.log() + shift
    d = softmax_gradient(logits.clone(), labels, log_total, grad, cap, backend=backend)
    return log_total, chosen, d


@pytest.mark.parametrize("cap", [None, 30.0, 0.5])
@pytest.mark.parametrize("width", [1, 70, 4096, 5000])
def test_values_and_gradients(width, cap):
    logits, labels, grad = make_inputs(9, width)
    exact = both(logits.double(), labels, grad.double(), cap, "torch")
    got = both(logits, labels, grad, cap, "triton")
    for one, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("cap", [None, 30.0])
def test_logits_that_exp_cannot_take(cap):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, -3e38, -3e38], [88.0, 89.0, 90.0]])
    labels, grad = torch.tensor([1, 0, 2]), torch.ones(3)
    exact = both(logits.double(), labels, grad.double(), cap, "torch")
    for one, expected in zip(both(logits, labels, grad, cap, "triton"), exact, strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_slices_of_wider_rows_are_read_and_written_in_place():
    logits, labels, grad = make_inputs(8, 300, dtype=torch.bfloat16)
    part = logits[:, :200]
    exact = both(part.double(), labels, grad.double(), 30.0, "torch")
    statistics = softmax_statistics(part, labels, 30.0, backend="triton")
    torch.testing.assert_close(statistics[1].log() + statistics[0], exact[0].float())
    rest = logits[:, 200:].clone()
    d = softmax_gradient(part, labels, exact[0].float(), grad, 30.0, backend="triton")
    assert d.data_ptr() == logits.data_ptr() and torch.equal(logits[:, 200:], rest)
    torch.testing.assert_close(d.double(), exact[2], rtol=2**-7, atol=1e-6)


def test_columns_that_lie_apart_are_refused():
    logits, labels, _ = make_inputs(4, 6)
    with pytest.raises(ValueError, match="side by side"):
        softmax_statistics(logits.t().contiguous().t(), labels, None, backend="triton")


def test_custom_op_rules():
    logits, labels, grad = make_inputs(6, 20)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        cross_entropy_triton.statistics_triton, (logits, labels, 30.0), test_utils=tests
    )
    arguments = (logits, labels, torch.zeros(6), grad, 30.0)
    torch.library.opcheck(cross_entropy_triton.gradient_triton, arguments, test_utils=tests)
