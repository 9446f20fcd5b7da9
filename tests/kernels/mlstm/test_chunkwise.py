"""The mLSTM kernels against the float64 step recurrence."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.comparison import assert_float32_close, assert_same, relative_error, run
from xlstm_kernels import mlstm_chunkwise, mlstm_step
from xlstm_kernels.mlstm.reference import mlstm_recurrence
from xlstm_kernels.mlstm.torch import chunkwise as chunkwise_torch
from xlstm_kernels.mlstm.torch.carry import CHUNK_GROUP
from xlstm_kernels.mlstm.torch.decays import stabilizer

B, HEADS, QK, V = 2, 2, 8, 12
GATES = {
    "usual": lambda s: (torch.randn(B, HEADS, s), torch.randn(B, HEADS, s) + 4),
    "random +-15": lambda s: tuple(15.0 * torch.randn(B, HEADS, s).sign() for _ in range(2)),
    "both +15": lambda s: (torch.full((B, HEADS, s), 15.0),) * 2,
    "igate -10, fgate +6": lambda s: (
        torch.full((B, HEADS, s), -10.0),
        torch.full((B, HEADS, s), 6.0),
    ),
    "fgate -15": lambda s: (torch.randn(B, HEADS, s), torch.full((B, HEADS, s), -15.0)),
}


def make_inputs(s, gates="usual", state=False, seed=0):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(B, HEADS, s, d) for d in (QK, QK, V))
    i, f = GATES[gates](s)
    inputs = {"q": q, "k": k, "v": v, "i": i, "f": f}
    if state:
        inputs["C0"] = torch.randn(B, HEADS, QK, V)
        inputs["n0"] = torch.randn(B, HEADS, QK)
        inputs["m0"] = torch.randn(B, HEADS)
    return inputs


def split(x):
    arguments = [x[name] for name in ("q", "k", "v", "i", "f")]
    return arguments, (x["C0"], x["n0"], x["m0"]) if "C0" in x else None


def recurrence(x, chunk_size=None, **options):
    arguments, state = split(x)
    h, (C, n, m) = mlstm_recurrence(*arguments, state, **options)
    return {"h": h, "C": C, "n": n, "m": m}


def chunkwise(x, **options):
    arguments, state = split(x)
    h, (C, n, m) = mlstm_chunkwise(*arguments, state, return_last_state=True, **options)
    return {"h": h, "C": C, "n": n, "m": m}


def some_boundaries(s, every=5, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, s, generator=generator) < 1 / every


@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("s", [1, 2, 63, 64, 65, 129])
def test_float32_values_states_and_gradients(s, gates, state):
    boundaries = some_boundaries(s, every=40) if state else None
    assert_float32_close(
        chunkwise, recurrence, make_inputs(s, gates, state), boundaries=boundaries, chunk_size=64
    )


def test_float32_at_a_length_of_1000():
    inputs = make_inputs(1000, state=True)
    assert_float32_close(chunkwise, recurrence, inputs, boundaries=some_boundaries(1000, every=300))


@pytest.mark.parametrize("gates", GATES)
def test_every_token_its_own_document(gates):
    inputs = make_inputs(37, gates, state=True)
    boundaries = torch.ones(B, 37, dtype=torch.bool)
    assert_float32_close(chunkwise, recurrence, inputs, boundaries=boundaries, chunk_size=16)


@pytest.mark.parametrize("s", [1000, 8192, 32768])
def test_errors_do_not_grow_with_the_length(s):
    """bfloat16 and float32 beside float64 of the same function, on inputs that bfloat16 has."""
    torch.manual_seed(0)
    inputs = {name: torch.randn(1, 1, s, 16).bfloat16() for name in "qkv"}
    inputs |= {"i": torch.randn(1, 1, s).bfloat16(), "f": torch.randn(1, 1, s).bfloat16() + 5}

    exact = run(chunkwise, inputs, torch.float64)
    for dtype, value_limit, grad_limit in (
        (torch.bfloat16, 1e-2, 1e-2),
        (torch.float32, 5e-6, 2e-5),
    ):
        got = run(chunkwise, inputs, dtype)
        for name, reference in exact.items():
            error = relative_error(got[name], reference)
            limit = grad_limit if name.startswith("d_") else value_limit
            assert error <= limit, f"{dtype} {name}: error {error:.2e} above {limit:.0e}"


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bounded", [False, True])
def test_options_in_float64(gate, normalize, bounded):
    inputs = make_inputs(37, state=True)
    options = {"gate": gate, "normalize": normalize}
    options["boundaries"] = some_boundaries(37) if bounded else None
    expected = run(recurrence, inputs, torch.float64, **options)
    assert_same(run(chunkwise, inputs, torch.float64, chunk_size=8, **options), expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 16, 64, 129, 1000, None])
@pytest.mark.parametrize("bounded", [False, True])
def test_every_chunk_size_gives_the_same(chunk_size, bounded):
    s = 129
    assert s > 2 * CHUNK_GROUP  # chunks of 1 and 2 go through several groups
    inputs = make_inputs(s, state=True)
    boundaries = some_boundaries(s, every=30) if bounded else None
    expected = run(recurrence, inputs, torch.float64, boundaries=boundaries)
    got = run(chunkwise, inputs, torch.float64, boundaries=boundaries, chunk_size=chunk_size)
    assert_same(got, expected)


@pytest.mark.parametrize("bounded", [False, True])
def test_stabilizer_is_that_of_the_recurrence(bounded):
    inputs = make_inputs(50, "random +-15", state=True)
    boundaries = some_boundaries(50) if bounded else None
    log_f = torch.nn.functional.logsigmoid(inputs["f"].double())
    m_all = stabilizer(log_f, inputs["i"].double(), inputs["m0"], boundaries)
    for t in (0, 1, 2, 30, 49):
        head = {name: x[:, :, : t + 1] if x.ndim > 2 else x for name, x in inputs.items()}
        head |= {name: inputs[name] for name in ("C0", "n0")}
        cut = None if boundaries is None else boundaries[:, : t + 1]
        m = run(recurrence, head, torch.float64, boundaries=cut)["m"]
        torch.testing.assert_close(m_all[..., t], m, rtol=0, atol=1e-12)


def test_returned_state_belongs_to_the_rounded_m():
    """What is carried is exp(m) C: at m = 1000, rounding m alone would cost 3e-5 of C."""
    inputs = make_inputs(40)
    inputs["i"] += 1000
    exact = run(recurrence, inputs, torch.float64)
    got = run(chunkwise, inputs, torch.float32)
    ratio = (got["m"].double() - exact["m"]).exp()
    for name, scale in (("C", ratio[..., None, None]), ("n", ratio[..., None])):
        assert relative_error(got[name].double() * scale, exact[name]) < 5e-6


@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("position", range(9))
def test_boundary_is_a_new_sequence(position, state):
    """At every position: values and gradients of two sequences run on their own."""
    s = 9
    boundaries = torch.zeros(B, s, dtype=torch.bool)
    boundaries[:, position] = True

    def apart(x, **_):
        arguments, start = split(x)
        parts = []
        if position > 0:
            h, _ = mlstm_recurrence(*(a[:, :, :position] for a in arguments), start)
            parts.append(h)
        h, (C, n, m) = mlstm_recurrence(*(a[:, :, position:] for a in arguments))
        return {"h": torch.cat([*parts, h], 2), "C": C, "n": n, "m": m}

    inputs = make_inputs(s, "random +-15", state)
    inputs["f"][:, :, position] = -1e20  # gate sums restart: what closes the last document is gone
    expected = run(apart, inputs, torch.float64)
    for chunk_size in (4, 64):
        got = run(chunkwise, inputs, torch.float64, boundaries=boundaries, chunk_size=chunk_size)
        assert_same(got, expected)
        if state and position == 0:
            assert not got["d_C0"].any() and not got["d_n0"].any()


def test_boundary_at_the_start_of_a_fresh_sequence_changes_nothing():
    inputs = make_inputs(20)
    boundaries = torch.zeros(B, 20, dtype=torch.bool)
    boundaries[:, 0] = True
    expected = run(chunkwise, inputs, torch.float64)
    assert_same(run(chunkwise, inputs, torch.float64, boundaries=boundaries), expected, 1e-14)


def test_boundaries_are_per_row():
    boundaries = torch.zeros(B, 20, dtype=torch.bool)
    boundaries[1, 7] = True
    inputs = make_inputs(20)
    plain, bounded = (chunkwise(inputs, boundaries=b)["h"] for b in (None, boundaries))
    torch.testing.assert_close(plain[0], bounded[0])
    assert (plain[1, :, 7:] - bounded[1, :, 7:]).abs().max() > 1e-3


@pytest.mark.parametrize("cut", [1, 16, 21])
@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_two_segments_with_carried_state_are_one_sequence(cut, gate):
    def in_two(x, **_):
        arguments, state = split(x)
        options = {"return_last_state": True, "chunk_size": 8, "gate": gate}
        h1, state = mlstm_chunkwise(*(a[:, :, :cut] for a in arguments), state, **options)
        h2, (C, n, m) = mlstm_chunkwise(*(a[:, :, cut:] for a in arguments), state, **options)
        return {"h": torch.cat([h1, h2], 2), "C": C, "n": n, "m": m}

    inputs = make_inputs(33, state=True)
    expected = run(recurrence, inputs, torch.float64, gate=gate)
    assert_same(run(in_two, inputs, torch.float64), expected)


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("bounded", [False, True])
def test_finite_differences(gate, bounded):
    """With eps = 0 nothing depends on m, which carries no gradient."""
    s = 5
    torch.manual_seed(1)
    inputs = [torch.randn(1, 2, s, 3), torch.randn(1, 2, s, 3), torch.randn(1, 2, s, 2)]
    inputs += [torch.randn(1, 2, s), torch.randn(1, 2, s)]
    inputs += [torch.randn(1, 2, 3, 2), torch.randn(1, 2, 3)]
    inputs = [x.double().requires_grad_() for x in inputs]
    m0 = torch.zeros(1, 2, dtype=torch.float64)
    boundaries = torch.tensor([[False, False, False, bounded, False]])

    def function(q, k, v, i, f, C, n):
        h, (C, n, m) = mlstm_chunkwise(
            q, k, v, i, f, (C, n, m0), chunk_size=2, eps=0.0, gate=gate,
            boundaries=boundaries, return_last_state=True,
        )  # fmt: skip
        scale = m.exp()[..., None]
        return h, scale[..., None] * C, scale * n

    assert torch.autograd.gradcheck(function, inputs)


def test_reference_passes_finite_differences():
    torch.manual_seed(1)
    inputs = [torch.randn(1, 1, 4, d) for d in (3, 3, 2)] + [torch.randn(1, 1, 4)] * 2
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: mlstm_recurrence(*x, eps=0.0)[0], inputs)


def test_bfloat16_inputs_lose_only_the_rounding_of_the_outputs():
    inputs = {name: x.bfloat16() for name, x in make_inputs(65, state=True).items()}
    exact = run(recurrence, inputs, torch.float64)
    got = run(chunkwise, inputs, torch.bfloat16)
    assert got["h"].dtype == torch.bfloat16 and got["C"].dtype == torch.float32
    for name, reference in exact.items():
        # 2^-9 of rounding, and the loss weights of h are rounded as well
        assert relative_error(got[name], reference) < 1e-2, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_in_bfloat16_round_what_chunks_read_of_them(dtype):
    """And no more: a sequence of one chunk reads none, and the last state is carried unrounded."""
    inputs = make_inputs(96)
    narrow = {"states_dtype": torch.bfloat16}
    for chunk_size, apart in ((96, False), (16, True)):
        exact = run(chunkwise, inputs, dtype, chunk_size=chunk_size)
        got = run(chunkwise, inputs, dtype, chunk_size=chunk_size, **narrow)
        assert_same(*({name: x[name] for name in "Cnm"} for x in (got, exact)))
        errors = {name: relative_error(got[name], exact[name]) for name in exact}
        assert all((errors[name] > 1e-5) == apart for name in ("h", "d_q")), errors
        assert max(errors.values()) < 2**-8


def test_states_in_bfloat16_take_half_the_memory():
    """Of C between chunks: the largest thing that long sequences of wide heads keep."""
    kept = {}
    for dtype in (None, torch.bfloat16):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x
        ):
            arguments, _ = split(make_inputs(128))
            arguments = [x.requires_grad_() for x in arguments]
            mlstm_chunkwise(*arguments, chunk_size=16, states_dtype=dtype)
        kept[dtype] = sum(sizes)
    assert kept[None] - kept[torch.bfloat16] == 2 * (B * HEADS) * (128 // 16) * QK * V


def test_float32_gates_with_bfloat16_inputs():
    q, k, v, i, f = split(make_inputs(30))[0]
    f.requires_grad_()
    h = mlstm_chunkwise(q.bfloat16(), k.bfloat16(), v.bfloat16(), i, f)
    h.float().square().sum().backward()
    assert h.dtype == torch.bfloat16 and f.grad.dtype == torch.float32


@pytest.mark.parametrize("size", [40.0, 120.0, 1e4, 1e30])
def test_finite_input_never_gives_nan(size):
    for sign_i in (-1, 1):
        for sign_f in (-1, 1):
            inputs = make_inputs(40, state=True)
            inputs["i"], inputs["f"] = (
                sign_i * size * inputs["i"].abs(),
                sign_f * size * inputs["f"],
            )
            inputs["q"][:, :, ::3] = 0.0
            for gate, eps in (("exp", 1e-6), ("exp", 0.0), ("sigmoid", 1e-6)):
                got = run(chunkwise, inputs, torch.float32, chunk_size=16, gate=gate, eps=eps)
                for name, x in got.items():
                    assert x.isfinite().all(), (name, gate, eps, sign_i, sign_f)


def test_strided_inputs_and_a_second_backward():
    inputs = make_inputs(40)
    expected = run(chunkwise, inputs, torch.float32)
    arguments = [x.requires_grad_() for x in split(inputs)[0]]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arguments[:3]]
    h = mlstm_chunkwise(*strided, *arguments[3:])
    torch.testing.assert_close(h, expected["h"])
    upstream = torch.randn_like(h)
    kept = upstream.clone()
    first = torch.autograd.grad(h, arguments, upstream, retain_graph=True)
    second = torch.autograd.grad(h, arguments, upstream)
    assert torch.equal(upstream, kept)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_kept_for_the_backward_pass_is_linear_in_the_length():
    def numbers(s):
        kept = []

        def pack(x):
            kept.append(x.numel())
            return x

        arguments = [x.requires_grad_() for x in split(make_inputs(s))[0]]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            mlstm_chunkwise(*arguments)
        return sum(kept)

    assert numbers(4096) == 4 * numbers(1024)


def test_rows_in_blocks_are_the_same_rows(monkeypatch):
    inputs = make_inputs(33, "random +-15", state=True)
    boundaries = some_boundaries(33)
    expected = run(chunkwise, inputs, torch.float64, boundaries=boundaries, chunk_size=8)
    for numbers in (1, 3 * 33 * V):
        monkeypatch.setattr(chunkwise_torch, "BLOCK_NUMBERS", numbers)
        got = run(chunkwise, inputs, torch.float64, boundaries=boundaries, chunk_size=8)
        assert_same(got, expected, 1e-13)


class Allocations(TorchDispatchMode):
    """Numbers in the largest tensor that an operation made in memory of its own."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)]
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.itemsize)
        return out


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_steps_are_in_place_and_allocate_no_second_state(gate):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, HEADS, 64) for _ in range(3))
    i, f = torch.randn(B, HEADS), torch.randn(B, HEADS)
    state = torch.randn(B, HEADS, 64, 64), torch.randn(B, HEADS, 64), torch.randn(B, HEADS)
    before = [(x.data_ptr(), x.clone()) for x in state]
    with Allocations() as made:
        mlstm_step(q, k, v, i, f, state, gate=gate, backend="torch")
    for x, (address, old) in zip(state, before, strict=True):
        assert x.data_ptr() == address and not torch.equal(x, old)
    assert 0 < made.largest <= q.numel()


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_steps_are_the_sequence(gate, normalize):
    inputs = make_inputs(12, "random +-15")
    options = {"gate": gate, "normalize": normalize}
    expected = run(recurrence, inputs, torch.float64, **options)
    arguments, _ = split({name: x.double() for name, x in inputs.items()})
    state = tuple(torch.zeros(B, HEADS, *d, dtype=torch.float64) for d in ((QK, V), (QK,), ()))
    for t in range(12):
        h = mlstm_step(*(a[:, :, t] for a in arguments), state, **options)
        assert relative_error(h, expected["h"][:, :, t]) < 1e-11
    for got, name in zip(state, "Cnm", strict=True):
        assert relative_error(got, expected[name]) < 1e-12
