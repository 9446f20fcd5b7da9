"""bf16 on a CPU without bf16 products: every product is the fp32 one, rounded once."""

import pytest
import torch

from pretrain.engines import bf16_products
from pretrain.engines.bf16_products import RoundedProducts
from tests.dist import work


def rounded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize(
    ("product", "shapes"),
    [
        (torch.mm, [(5, 70), (70, 9)]),
        (torch.bmm, [(2, 5, 70), (2, 70, 9)]),
        (torch.addmm, [(5, 9), (5, 70), (70, 9)]),
        (torch.baddbmm, [(2, 5, 9), (2, 5, 70), (2, 70, 9)]),
        (torch.mv, [(5, 70), (70,)]),
        (torch.nn.functional.linear, [(3, 5, 70), (9, 70), (9,)]),
    ],
)
def test_a_product_is_the_fp32_one_rounded_once(product, shapes):
    operands = [rounded(*shape) for shape in shapes]
    with RoundedProducts():
        found = product(*operands)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, product(*(x.float() for x in operands)).bfloat16())


def test_a_product_into_a_given_tensor_is_written_there():
    a, b, out = rounded(5, 70), rounded(70, 9), rounded(5, 9)
    with RoundedProducts():
        torch.mm(a, b, out=out)
    assert torch.equal(out, (a.float() @ b.float()).bfloat16())


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("bmm", [(2, 5, 70), (2, 70, 9)]),
        ("addmm", [(5, 9), (5, 70), (70, 9)]),
        ("baddbmm", [(2, 5, 9), (2, 5, 70), (2, 70, 9)]),
    ],
)
def test_every_form_of_a_product_is_rounded_once(name, shapes):
    operands = [rounded(*shape) for shape in shapes]
    expected = getattr(torch, name)(*(x.float() for x in operands)).bfloat16()
    given = torch.empty_like(expected)
    with RoundedProducts():
        getattr(torch, name)(*operands, out=given)
        if name != "bmm":  # it has no form in place
            getattr(operands[0], f"{name}_")(*operands[1:])
    assert torch.equal(given, expected)
    assert name == "bmm" or torch.equal(operands[0], expected)


def test_gradients_are_rounded_products_too():
    a, b = rounded(5, 70).requires_grad_(), rounded(70, 9)
    with RoundedProducts():
        (a @ b).sum().backward()
    expected = (torch.ones(5, 9) @ b.float().T).bfloat16()
    assert torch.equal(a.grad, expected)


def test_products_of_other_types_are_left_alone():
    a = torch.randn(4, 4, dtype=torch.float64)
    with RoundedProducts():
        found = a @ a
    assert torch.equal(found, a @ a)


def test_the_native_products_differ_in_the_last_bit_at_most():
    a, b = rounded(64, 256), rounded(256, 64)
    with RoundedProducts():
        found = a @ b
    torch.testing.assert_close(found, a @ b, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(("precision", "slow", "emulates"), [
    ("fp32", True, False), ("bf16", False, False), ("bf16", True, True),
])  # fmt: skip
def test_an_engine_emulates_where_native_products_are_slow(monkeypatch, precision, slow, emulates):
    monkeypatch.setattr(bf16_products, "slow_natively", lambda: slow)
    config = work.run_config("large", engine__precision=precision)
    engine, layout = work.make_engine(config)
    try:
        assert (engine._products is RoundedProducts) == emulates
        losses = [loss for loss, _ in work.train_steps(engine, layout, config, 0, 3)]
    finally:
        engine.close()
        layout.close()
    assert losses[-1] < losses[0]
    # To what bf16 resolves, the losses of fp32 (ln 96 is 4.56).
    assert losses == pytest.approx([4.6, 4.6, 4.6], abs=0.6)
