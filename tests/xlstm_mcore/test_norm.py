"""The norm of a block: its own RMSNorm on a CPU against torch's, and what a GPU gets."""

import pytest
import torch
import torch.nn.functional as F

from xlstm_mcore.build import make_config
from xlstm_mcore.modules import norm as norm_module
from xlstm_mcore.modules.norm import Norm

MODEL = {"pattern": "M", "hidden_size": 48, "num_heads": 2, "vocab_size": 64}


def make(dtype, **model):
    config = make_config(MODEL | model)
    config.params_dtype = dtype
    norm = Norm(config, "norm.weight")
    with torch.no_grad():
        norm.weight.copy_(torch.rand(48) + 0.5)
    return norm


@pytest.mark.parametrize("shape", [(48,), (7, 48), (5, 3, 48)], ids=str)
def test_rms_norm_equals_torchs(shape):
    norm = make(torch.float64)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    d = torch.randn(*shape, dtype=torch.float64)
    expected = F.rms_norm(x, (48,), norm.weight, norm.eps)
    wanted = torch.autograd.grad(expected, (x, norm.weight), d)
    got = norm(x)
    found = torch.autograd.grad(got, (x, norm.weight), d)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_bf16_is_normalised_in_fp32_and_rounded_once():
    norm = make(torch.bfloat16)
    x = torch.randn(9, 48).bfloat16()
    exact = F.rms_norm(x.double(), (48,), norm.weight.double(), norm.eps)
    torch.testing.assert_close(norm(x), exact.bfloat16(), rtol=2**-7, atol=0)


def test_zeros_give_zeros():
    norm = make(torch.float32)
    x = torch.zeros(2, 48, requires_grad=True)
    norm(x).sum().backward()
    assert not norm(x).any() and x.grad.isfinite().all()


@pytest.mark.parametrize(("asked", "kernels"), [(None, 1), ("triton", 1), ("torch", 0)])
def test_a_gpu_has_one_kernel_for_it(asked, kernels, monkeypatch):
    calls = []
    monkeypatch.setattr(norm_module, "norm_backend", lambda *_: "triton")

    def kernel(x, weight, *options, layout):
        calls.append((x.shape, options, layout))
        return x

    monkeypatch.setattr(norm_module, "multihead_norm", kernel)
    norm = make(torch.float32, kernel_backend=asked)
    norm(torch.randn(3, 48))
    assert calls == [((3, 48), ("rmsnorm", norm.eps), "row")] * kernels


def test_a_gpu_adds_and_normalises_by_one_kernel(monkeypatch):
    monkeypatch.setattr(norm_module, "norm_backend", lambda *_: "triton")
    calls = []
    monkeypatch.setattr(norm_module, "add_norm", lambda *x: calls.append(x) or (x[0], x[1]))
    norm = make(torch.float32)
    x, added = torch.randn(2, 3, 48)
    assert norm(x, added) == (x, added)
    assert [call[3:] for call in calls] == [("rmsnorm", norm.eps)]


def test_a_sum_and_its_norm_elsewhere():
    norm = make(torch.float32)
    x, added = torch.randn(2, 3, 48)
    total, y = norm(x, added)
    assert torch.equal(total, x + added) and torch.equal(y, norm(total))
