"""The vocabulary-parallel loss against torch's, in one process (tests/dist has several)."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.modules import loss as loss_module
from xlstm_mcore.modules.loss import linear_cross_entropy, vocab_parallel_cross_entropy


@pytest.fixture(scope="module")
def group():
    return single_process_groups().tp


def reference(logits, labels, cap):
    y = logits if cap is None else cap * torch.tanh(logits / cap)
    return F.cross_entropy(y.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


@pytest.mark.parametrize("cap", [None, 30.0, 2.0])
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 2, 50), (5, 4, 129)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_the_loss_equals_torchs(group, monkeypatch, cap, shape, dtype, rows):
    monkeypatch.setitem(loss_module._ELEMENTS, "cpu", rows * shape[-1])
    rng = torch.Generator().manual_seed(0)
    values = 4 * torch.randn(shape, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=rng)
    weight = torch.rand(shape[:-1], generator=rng, dtype=torch.float64)

    expected_input = values.clone().requires_grad_()
    expected = reference(expected_input, labels, cap)
    (expected * weight).sum().backward()

    leaf = values.to(dtype).requires_grad_()
    got = vocab_parallel_cross_entropy(leaf.clone(), labels, cap, group)
    assert got.dtype == dtype and got.shape == labels.shape
    (got * weight.to(dtype)).sum().backward()
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(got.double(), expected, rtol=limit, atol=limit)
    torch.testing.assert_close(leaf.grad.double(), expected_input.grad, rtol=0, atol=limit)


def test_bf16_logits_are_summed_in_fp32(group):
    rng = torch.Generator().manual_seed(0)
    values = (4 * torch.randn(6, 2, 300, generator=rng)).bfloat16()
    labels = torch.randint(0, 300, (6, 2), generator=rng)
    exact = values.double().requires_grad_()
    expected = reference(exact, labels, 30.0)
    expected.sum().backward()
    leaf = values.clone().requires_grad_()
    got = vocab_parallel_cross_entropy(leaf.clone(), labels, 30.0, group)
    got.sum().backward()
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 1e-5
    assert (leaf.grad - exact.grad).abs().max() < 2**-8  # bf16's own rounding of values below 1


def test_huge_logits_stay_finite(group):
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    for label, expected in ((0, 0.0), (1, 2e4)):
        leaf = logits.clone().requires_grad_()
        got = vocab_parallel_cross_entropy(leaf.clone(), torch.tensor([label]), None, group)
        got.sum().backward()
        assert got.item() == expected
        assert torch.isfinite(leaf.grad).all()


def test_a_second_backward_is_refused(group):
    leaf = torch.randn(2, 5, requires_grad=True)
    got = vocab_parallel_cross_entropy(leaf.clone(), torch.tensor([1, 2]), 30.0, group).sum()
    got.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        got.backward()


@pytest.mark.parametrize("cap", [None, 30.0, 2.0])
@pytest.mark.parametrize("columns", [1, 7, 32, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_logits_equals_torch_through_the_head(group, cap, columns, dtype):
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, 16, generator=rng, dtype=torch.float64)
    weight = torch.randn(50, 16, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, 50, (5, 3), generator=rng)
    mask = torch.rand(5, 3, generator=rng, dtype=torch.float64)
    exact = [t.clone().requires_grad_() for t in (hidden, weight)]
    expected = reference(exact[0] @ exact[1].t(), labels, cap)
    (expected * mask).sum().backward()

    leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
    size = columns * 15 * dtype.itemsize
    got = linear_cross_entropy(*leaves, labels, cap, group, size)
    assert got.dtype == dtype and got.shape == labels.shape
    (got * mask.to(dtype)).sum().backward()
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), expected, rtol=limit, atol=limit)
    for leaf, reference_leaf in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), reference_leaf.grad, rtol=0, atol=limit)


@pytest.mark.parametrize("tokens", [1, 23, 49, 50])
@pytest.mark.parametrize("columns", [7, 1000])
def test_padding_of_the_vocabulary_gets_no_logit(group, tokens, columns):
    """The loss is that of a head without those rows, and their gradient is zero."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, 16, generator=rng, dtype=torch.float64)
    weight = torch.randn(50, 16, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, tokens, (5, 3), generator=rng)
    exact = [t.clone().requires_grad_() for t in (hidden, weight)]
    expected = reference(exact[0] @ exact[1][:tokens].t(), labels, 30.0)
    expected.square().sum().backward()
    for way in ("logits", "none"):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        if way == "logits":
            logits = leaves[0] @ leaves[1].t()
            got = vocab_parallel_cross_entropy(logits, labels, 30.0, group, tokens)
        else:
            got = linear_cross_entropy(*leaves, labels, 30.0, group, columns * 15 * 8, tokens)
        got.square().sum().backward()
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        for leaf, wanted in zip(leaves, exact, strict=True):
            torch.testing.assert_close(leaf.grad, wanted.grad, rtol=0, atol=1e-12)
        assert not leaves[1].grad[tokens:].any()


def test_bf16_without_logits_sums_slices_in_fp32(group):
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=rng).bfloat16().requires_grad_()
    weight = torch.randn(300, 16, generator=rng).bfloat16().requires_grad_()
    labels = torch.randint(0, 300, (40,), generator=rng)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    reference(exact[0] @ exact[1].t(), labels, 30.0).sum().backward()
    got = linear_cross_entropy(hidden, weight, labels, 30.0, group, 10 * 40 * 4)
    assert got.dtype == torch.float32
    got.sum().backward()
    for leaf, wanted in zip((hidden, weight), exact, strict=True):
        assert leaf.grad.dtype == torch.bfloat16
        assert (leaf.grad - wanted.grad).abs().max() < 2**-6 * wanted.grad.abs().max()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_is_as_large_as_the_logits(group):
    """Peak memory, counted: slices, the weight and its gradient, and nothing of rows x vocabulary.

    The other way is counted too, to see that the counter sees.
    """
    rows, vocab, width, columns = 400, 1000, 8, 50
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    labels = torch.randint(0, vocab, (rows,))
    with Largest() as seen, torch.autograd.set_multithreading_enabled(False):
        linear_cross_entropy(
            hidden, weight, labels, 30.0, group, columns * rows * 4
        ).sum().backward()
    assert seen.elements == rows * columns
    with Largest() as seen:
        vocab_parallel_cross_entropy(hidden @ weight.t(), labels, 30.0, group).sum()
    assert seen.elements == rows * vocab
