"""All projections of the 7B-style mixer in one step: results and gradients are those of torch."""

import pytest
import torch
import torch.nn.functional as F

from xlstm_mcore.modules.projections import Heads, _Project

HEADS = Heads(2, 3, (4, 4, 8, 8))
WIDTH = 3 * sum(HEADS.dims)


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = {"x": (10, 16), "weight": (WIDTH, 16), "gates": (6, 16), "bias": (6,)}
    return {name: torch.randn(shape).to(dtype).requires_grad_() for name, shape in shapes.items()}


def project(x, weight, gates, bias):
    return _Project.apply(x, weight, gates, bias, HEADS, False)


def by_torch(x, weight, gates, bias):
    parts = (x @ weight.t()).split([3 * dim for dim in HEADS.dims], dim=-1)
    parts = [
        part.view(5, 2, 3, dim).permute(1, 2, 0, 3)
        for part, dim in zip(parts, HEADS.dims, strict=True)
    ]
    preacts = F.linear(x, gates, bias).view(5, 2, 6).permute(1, 2, 0)
    return *parts, *preacts.chunk(2, dim=1)


def gradients(function, given, used):
    torch.manual_seed(1)
    outputs = function(**given)
    total = sum((outputs[i] * torch.randn(outputs[i].shape)).sum() for i in used)
    return torch.autograd.grad(total, list(given.values()), allow_unused=True)


def test_results_are_those_of_torch():
    given = inputs()
    for ours, theirs in zip(project(**given), by_torch(**given), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.shape == theirs.shape


@pytest.mark.parametrize("used", [range(6), (1, 3), (4,), (0, 5)], ids=str)
def test_gradients_are_those_of_torch_and_zero_where_nothing_is_used(used):
    ours, theirs = (gradients(one, inputs(), used) for one in (project, by_torch))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


def test_gates_of_narrow_tokens_are_fp32_and_lose_nothing_to_the_width():
    """Against fp64 of the same numbers; the gates' gradient keeps sixteen bits."""
    narrow = inputs(torch.bfloat16)
    exact = {name: t.detach().double().requires_grad_() for name, t in narrow.items()}
    igate, fgate = project(**narrow)[4:]
    assert igate.dtype == fgate.dtype == torch.float32
    torch.testing.assert_close(igate.double(), by_torch(**exact)[4], rtol=1e-5, atol=1e-5)
    found, true = gradients(project, narrow, (4, 5)), gradients(by_torch, exact, (4, 5))
    for one, other in zip(found, true, strict=True):
        if other is None:
            continue
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, rtol=2**-8, atol=1e-3)
