"""The checker finds planted faults and is silent about correct kernels."""

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.triton.checker import Checker, MemoryFaultError
from tests.kernels.triton.toy_kernels import product_kernel


@triton.jit
def copy_kernel(x, y, n, LOADED: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr):
    """y[:n] = x[:n] by programs of BLOCK elements; masks only where LOADED, STORED say so."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n) if LOADED else tl.load(x + i)
    if STORED:
        tl.store(y + i, value, mask=i < n)
    else:
        tl.store(y + i, value)


@triton.jit
def shift_kernel(x, y, offset, BLOCK: tl.constexpr):
    """y[i + offset] = x[i], by programs of BLOCK elements."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i + offset, tl.load(x + i))


@triton.jit
def gather_kernel(x, y, BLOCK: tl.constexpr):
    """y = rows of 4: every lane of a row writes the row's first place."""
    i = tl.arange(0, BLOCK)
    tl.store(y + i // 4 * 4, tl.load(x + i))


@triton.jit
def sum_kernel(x, total, BLOCK: tl.constexpr):
    """total += sum of x, atomically."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total, tl.sum(tl.load(x + i), 0))


def faults(launch):
    """What the checker says of `launch()`; the checker's own message has it too."""
    checker = Checker()
    with pytest.raises(MemoryFaultError) as error, checker:
        launch()
    assert checker.faults[0] in str(error.value)
    return checker.faults


def apart(dtype, length):
    """Two tensors of zeros, the second far behind the first: neither's neighbour is the other."""
    memory = bytearray(8192)
    return [torch.frombuffer(memory, dtype=dtype, count=length, offset=o) for o in (1024, 4096)]


def test_masked_copy_is_clean_and_correct():
    x, y = torch.randn(100), torch.zeros(100)
    with Checker() as checker:
        copy_kernel[(4,)](x, y, 100, True, True, 32)
    assert torch.equal(x, y)
    assert checker.kernels == {"copy_kernel"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_load_past_the_end(dtype):
    y, x = apart(dtype, 100)
    x.fill_(1)
    found = faults(lambda: copy_kernel[(4,)](x, y, 100, False, True, 32))
    assert len(found) == 1
    assert "program (3, 0, 0): load out of bounds in 28 lanes" in found[0]
    assert f"{x.element_size()} bytes past the end of x" in found[0]
    assert torch.equal(x, y), "what is in bounds is still done"


def test_store_past_the_end_does_not_happen():
    x, whole = torch.ones(128), torch.zeros(128)
    found = faults(lambda: copy_kernel[(4,)](x, whole[:100], 128, True, False, 32))
    assert "store out of bounds in 28 lanes" in found[0]
    assert "between the elements of y" in found[0]
    assert whole[100:].eq(0).all()


def test_access_between_the_elements_of_a_view():
    x = torch.randn(16, 4)
    found = faults(lambda: copy_kernel[(1,)](x[:, 0], torch.empty(16), 16, True, True, 16))
    assert "load out of bounds in 12 lanes" in found[0]


def test_access_before_the_start():
    y, x = apart(torch.float32, 16)
    found = faults(lambda: shift_kernel[(1,)](x, y, -2, 16))
    assert "store out of bounds in 2 lanes, the first 8 bytes before y" in found[0]


def test_two_programs_store_to_one_place():
    found = faults(lambda: copy_kernel[(2, 2)](torch.ones(64), torch.empty(64), 64, True, True, 32))
    assert found[0].startswith("copy_kernel, program (0, 1, 0): store races")
    assert "another program stored byte 0 of y" in found[0]


@pytest.mark.parametrize(("offset", "verb"), [(-8, "loaded"), (8, "stored")])
def test_one_program_stores_what_another_loads(offset, verb):
    """In place by 8: programs read their neighbours' places, before or after these store there."""
    memory = torch.zeros(96)
    view = memory[16:80]
    found = faults(lambda: shift_kernel[(2,)](view, memory, 16 + offset, 32))
    assert any(f"another program {verb}" in fault for fault in found), found


def test_two_launches_may_share_what_two_programs_may_not():
    x, y = torch.randn(64), torch.zeros(80)
    with Checker():
        shift_kernel[(2,)](x, y, 0, 32)
        shift_kernel[(2,)](y[:64], x, 0, 32)
        shift_kernel[(2,)](x, y, 8, 32)


def test_lanes_of_one_store():
    found = faults(lambda: gather_kernel[(1,)](torch.randn(16), torch.zeros(16), 16))
    assert found == ["gather_kernel, program (0, 0, 0): store writes two values to one place of y"]
    with Checker():
        gather_kernel[(1,)](torch.ones(16), torch.zeros(16), 16)


def test_atomics_are_no_race_but_have_bounds():
    x, total = torch.ones(64), torch.zeros(1)
    with Checker():
        sum_kernel[(2,)](x, total, 32)
    assert total.item() == 64
    found = faults(lambda: sum_kernel[(1,)](x, total[1:], 64))
    assert "atomic" in found[0]


def test_bf16_products_work_in_the_interpreter():
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 32).bfloat16()
    out = torch.empty(32, 32, dtype=torch.bfloat16)
    with Checker():
        product_kernel[(2, 2)](a, b, out, 32, 32, 32, 16, 16, 16)
    assert torch.equal(out, (a.float() @ b.float()).bfloat16())


def test_casts_to_bf16_round_to_nearest_even():
    x = torch.cat([torch.randn(60) * 1e3, torch.tensor([0.0, -0.0, 1e39, -1e-45])])
    y = torch.empty(64, dtype=torch.bfloat16)
    copy_kernel[(1,)](x, y, 64, True, True, 64)
    assert torch.equal(y.view(torch.int16), x.bfloat16().view(torch.int16))


def test_the_interpreter_is_restored():
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    before = InterpreterBuilder.create_masked_load, GridExecutor.__call__
    with Checker():
        assert InterpreterBuilder.create_masked_load is not before[0]
    assert (InterpreterBuilder.create_masked_load, GridExecutor.__call__) == before
