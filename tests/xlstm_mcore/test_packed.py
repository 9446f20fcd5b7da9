"""Projections in one tensor: the same views and gradients as by torch, and one packed gradient."""

import torch

from xlstm_mcore.modules.packed import split_heads

HEADS, DIMS = 3, (4, 4, 8, 8)


def by_torch(packed):
    s, b, _ = packed.shape
    parts = packed.split([HEADS * dim for dim in DIMS], dim=-1)
    return [
        part.view(s, b, HEADS, dim).permute(1, 2, 0, 3)
        for part, dim in zip(parts, DIMS, strict=True)
    ]


def test_views_and_gradients_are_those_of_torch():
    packed = torch.randn(5, 2, HEADS * sum(DIMS), requires_grad=True)
    again = packed.detach().clone().requires_grad_()
    ours, theirs = split_heads(packed, HEADS, DIMS), by_torch(again)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()
    weights = [torch.randn_like(one) for one in theirs]
    for parts in (ours, theirs):
        sum((w * x.square()).sum() for w, x in zip(weights, parts, strict=True)).backward()
    assert torch.equal(packed.grad, again.grad)
    assert packed.grad.is_contiguous()


def test_what_is_not_used_has_a_gradient_of_zero():
    packed = torch.randn(5, 2, HEADS * sum(DIMS), requires_grad=True)
    split_heads(packed, HEADS, DIMS)[1].sum().backward()
    width = HEADS * DIMS[0]
    assert packed.grad[..., width : 2 * width].eq(1).all()
    assert packed.grad.sum() == 5 * 2 * width


def test_a_part_of_a_wider_tensor_is_split_where_it_lies():
    wide = torch.randn(5, 2, 10 + HEADS * sum(DIMS))
    for one, other in zip(
        split_heads(wide[..., 10:], HEADS, DIMS), by_torch(wide[..., 10:].contiguous()), strict=True
    ):
        assert torch.equal(one, other)
