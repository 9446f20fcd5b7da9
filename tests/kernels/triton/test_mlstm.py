"""The mLSTM on Triton against the float64 recurrence and the PyTorch implementation."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels.comparison import assert_float32_close, relative_error, run
from xlstm_kernels import mlstm_chunkwise, mlstm_step
from xlstm_kernels.mlstm.reference import mlstm_recurrence
from xlstm_kernels.mlstm.triton import chunkwise as chunkwise_triton
from xlstm_kernels.mlstm.triton import launches as triton_plan
from xlstm_kernels.mlstm.triton import step as step_triton
from xlstm_kernels.mlstm.triton import tiles as triton_config
from xlstm_kernels.mlstm.triton.tiles import MlstmConfig, Tile

SMALL = Tile(16, 16, 16, 4, 2)
GATES = {
    "usual": lambda *n: (torch.randn(n), torch.randn(n) + 4),
    "random +-15": lambda *n: tuple(15.0 * torch.randn(n).sign() for _ in range(2)),
    "both +15": lambda *n: (torch.full(n, 15.0),) * 2,
    "igate -10, fgate +6": lambda *n: (torch.full(n, -10.0), torch.full(n, 6.0)),
    "fgate -15": lambda *n: (torch.randn(n), torch.full(n, -15.0)),
}


def make_inputs(s, qk=24, v=20, b=1, heads=2, gates="usual", state=False, seed=0):
    torch.manual_seed(seed)
    x = {name: torch.randn(b, heads, s, d) for name, d in (("q", qk), ("k", qk), ("v", v))}
    x["i"], x["f"] = GATES[gates](b, heads, s)
    if state:
        x["C0"] = torch.randn(b, heads, qk, v)
        x["n0"], x["m0"] = torch.randn(b, heads, qk), torch.randn(b, heads)
    return x


def split(x):
    arguments = [x[name] for name in ("q", "k", "v", "i", "f")]
    return arguments, (x["C0"], x["n0"], x["m0"]) if "C0" in x else None


def recurrence(x, boundaries=None, gate="exp", normalize=True, eps=1e-6, **_):
    arguments, state = split(x)
    h, (C, n, m) = mlstm_recurrence(
        *arguments, state, boundaries=boundaries, gate=gate, normalize=normalize, eps=eps
    )
    return {"h": h, "C": C, "n": n, "m": m}


def kernel(x, **options):
    arguments, state = split(x)
    options = {"backend": "triton"} | options
    h, (C, n, m) = mlstm_chunkwise(*arguments, state, return_last_state=True, **options)
    return {"h": h, "C": C, "n": n, "m": m}


def in_pytorch(x, **options):
    return kernel(x, **(options | {"backend": "torch"}))


def some_boundaries(s, b=1, every=5, seed=3):
    return torch.rand(b, s, generator=torch.Generator().manual_seed(seed)) < 1 / every


def check(x, **options):
    assert_float32_close(kernel, recurrence, x, **options)


@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("s", [1, 2, 63, 64, 65, 129])
def test_lengths(s, state):
    boundaries = some_boundaries(s, every=40) if state else None
    check(make_inputs(s, heads=1, state=state), boundaries=boundaries, chunk_size=64)


@pytest.mark.parametrize("gates", list(GATES)[1:])
def test_gates_at_their_extremes(gates):
    check(make_inputs(100, heads=1, gates=gates, state=True), chunk_size=64)


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bounded", [False, True])
def test_options(gate, normalize, bounded):
    boundaries = some_boundaries(50) if bounded else None
    x = make_inputs(50, state=True)
    check(x, gate=gate, normalize=normalize, boundaries=boundaries, chunk_size=32)


def recurrence_with_cap(x, gate_soft_cap, **options):
    capped = {name: gate_soft_cap * (x[name] / gate_soft_cap).tanh() for name in "if"}
    return recurrence(x | capped, **options)


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("cap", [0.3, 15.0])
def test_gate_soft_cap(cap, gate):
    """Far beyond the cap, around it and at zero, in values and gradients."""
    x = make_inputs(60, heads=1, state=True)
    x["i"], x["f"] = 3 * cap * x["i"], 3 * cap * torch.randn_like(x["f"])
    x["i"][..., 3:6], x["f"][..., 5:9] = 0.0, 30 * cap
    assert_float32_close(
        kernel, recurrence_with_cap, x, gate_soft_cap=cap, gate=gate, chunk_size=16,
        boundaries=some_boundaries(60, every=30),
    )  # fmt: skip


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("shut", [-torch.inf, -1e30, -1e13])
def test_shut_forget_gates(shut, gate):
    """As tests/kernels/test_edges.py has it for the other backends: chunks, gradients, a step."""
    x = make_inputs(40, heads=1)
    x["f"][..., [3, 15, 16, 30]] = shut
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    h = kernel(leaves, chunk_size=16, gate=gate)["h"]
    close = {name: t.clamp(min=-1e6).requires_grad_() for name, t in x.items()}
    expected = recurrence({name: t.double() for name, t in close.items()}, gate=gate)["h"]
    torch.testing.assert_close(h.double(), expected, rtol=1e-4, atol=1e-4)
    h.sum().backward()
    expected.sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, close[name].grad, rtol=1e-3, atol=1e-3, msg=name)
    state = (torch.zeros(1, 1, 24, 20), torch.zeros(1, 1, 24), torch.zeros(1, 1))
    for t in range(5):
        token = [x[name][:, :, t] for name in ("q", "k", "v", "i", "f")]
        got = mlstm_step(*token, state, gate=gate, backend="triton")
        torch.testing.assert_close(got.double(), expected[:, :, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk_size", [16, 31, 64, 128, 256, None])
def test_chunk_sizes(chunk_size):
    """Chunks of 128 and 256 have several tiles of rows; 256 here is one chunk, padded."""
    x = make_inputs(200, heads=1, state=True)
    check(x, chunk_size=chunk_size, boundaries=some_boundaries(200, every=60))


@pytest.mark.parametrize("qk, v", [(1, 1), (16, 40), (33, 16), (96, 192), (1024, 16), (16, 1024)])
def test_head_dimensions(qk, v):
    check(make_inputs(20, qk, v, heads=1, state=True), chunk_size=16)


@pytest.mark.parametrize("boundaries", [None, "some"])
def test_tiles_narrower_than_the_head(boundaries):
    """Several tiles along every axis, tokens included, none of which divide the sizes."""
    tiles = MlstmConfig(SMALL, SMALL, SMALL, SMALL)
    x = make_inputs(60, 24, 40, heads=1, state=True)
    starts = some_boundaries(60, every=20) if boundaries else None
    check(x, chunk_size=32, tiles=tiles, boundaries=starts)


@pytest.mark.parametrize("backward", ["some", "all"])
def test_one_pass_over_states_and_one_in_segments(monkeypatch, backward):
    x = make_inputs(120, heads=2, state=True)
    options = {"chunk_size": 16, "boundaries": some_boundaries(120, every=60)}
    names = []
    launch = triton_plan.Launch.run
    monkeypatch.setattr(triton_plan.Launch, "run", lambda self: (names.append(self.name),
                                                                  launch(self)))  # fmt: skip
    # More programs than chunks, then a segment of several chunks, then no segments at all.
    for programs in (132, 6) if backward == "some" else (1,):
        monkeypatch.setattr(triton_config, "PROGRAMS", programs)
        monkeypatch.setattr(triton_plan, "PROGRAMS", programs)
        check(x, **options)
    assert ("states resumed" in names) == (backward == "some")
    assert ("states" in names) == (backward == "all")


@pytest.mark.parametrize("bounded", [False, True])
def test_a_long_prefix_of_gates_is_reduced_in_blocks(monkeypatch, bounded):
    monkeypatch.setattr(triton_plan, "LONGEST_PREFIX", 32)
    boundaries = some_boundaries(150, every=50) if bounded else None
    x = make_inputs(150, 8, 8, heads=1, gates="random +-15", state=True)
    check(x, boundaries=boundaries, chunk_size=16)


@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
def test_boundary_at_every_position_of_a_chunk(state, monkeypatch):
    """Row r of the batch starts a document at token r: two sequences run on their own."""
    for module in (triton_config, triton_plan):  # few programs, for the interpreter
        monkeypatch.setattr(module, "PROGRAMS", 1)
    s = b = 17
    boundaries = torch.eye(s, dtype=torch.bool)
    x = make_inputs(s, 8, 8, b=b, heads=1, gates="random +-15", state=state)
    x["f"][boundaries[:, None]] = -1e20  # gate sums restart: what closes the last one is gone
    check(x, boundaries=boundaries, chunk_size=16)
    if state:
        got = run(kernel, x, torch.float32, boundaries=boundaries, chunk_size=16)
        assert not got["d_C0"][0].any() and not got["d_n0"][0].any()
        assert got["d_C0"][1].any()


def test_documents_of_one_token():
    x = make_inputs(40, heads=1, state=True)
    check(x, boundaries=torch.ones(1, 40, dtype=torch.bool), chunk_size=16)


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("cut", [1, 16, 21])
def test_two_segments_with_carried_state_are_one_sequence(cut, gate):
    def in_two(x, **_):
        arguments, state = split(x)
        options = {"chunk_size": 16, "gate": gate, "backend": "triton", "return_last_state": True}
        h1, state = mlstm_chunkwise(*(a[:, :, :cut] for a in arguments), state, **options)
        h2, (C, n, m) = mlstm_chunkwise(*(a[:, :, cut:] for a in arguments), state, **options)
        return {"h": torch.cat([h1, h2], 2), "C": C, "n": n, "m": m}

    assert_float32_close(in_two, recurrence, make_inputs(40, heads=1, state=True), gate=gate)


@pytest.mark.parametrize("gates", ["usual", "fgate -15", "igate -10, fgate +6"])
@pytest.mark.parametrize("states_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16(states_dtype, gates):
    x = {name: t.bfloat16() for name, t in make_inputs(200, 32, 32, 1, 1, gates, True).items()}
    options = {"chunk_size": 128, "boundaries": some_boundaries(200, every=150)}
    exact = run(recurrence, x, torch.float64, **options)
    got = run(kernel, x, torch.bfloat16, states_dtype=states_dtype, **options)
    assert got["h"].dtype == torch.bfloat16 and got["C"].dtype == torch.float32
    for name, reference in exact.items():
        assert relative_error(got[name], reference) < 1e-2, name


def test_states_in_bfloat16_change_nothing_but_the_forget_gate():
    """Products of bf16 operands round the states anyway; the gate's own sum reads them too."""
    x = make_inputs(150, 16, 1024, 1, 1, state=True)  # the tiles of the largest heads
    x = {name: t.bfloat16() for name, t in x.items()}
    options = {"chunk_size": 64, "boundaries": some_boundaries(150, every=100)}
    options["tiles"] = triton_config.mlstm_config("sm_90", 16, 1024, torch.bfloat16, 64, True)
    exact = run(recurrence, x, torch.float64, boundaries=options["boundaries"])
    wide, narrow, unasked = (
        run(kernel, x, torch.bfloat16, states_dtype=dtype, **options)
        for dtype in (torch.float32, torch.bfloat16, None)
    )
    for name, reference in exact.items():
        assert torch.equal(unasked[name], narrow[name]), name
        assert name == "d_f" or torch.equal(narrow[name], wide[name]), name
        error = relative_error(narrow[name], reference)
        assert error <= 1.2 * relative_error(wide[name], reference), name
    assert not torch.equal(narrow["d_f"], wide["d_f"])


def test_bfloat16_error_is_flat_in_length():
    """Where n.q has one sign: at its sign changes h is ill-conditioned at any length."""
    errors = []
    for s in (128, 768):
        x = make_inputs(s, 16, 16, 1, 1)
        x = {name: (t.abs() if name in "qk" else t).bfloat16() for name, t in x.items()}
        x["f"] += 2
        exact = run(in_pytorch, x, torch.float64)
        got = run(kernel, x, torch.bfloat16, chunk_size=256, states_dtype=torch.bfloat16)
        errors.append({name: relative_error(got[name], exact[name]) for name in exact})
    assert all(error < 1e-2 for error in errors[0].values()), errors[0]
    assert all(error < 1e-2 for error in errors[1].values()), errors[1]


def test_float32_gates_with_bfloat16_inputs():
    x = make_inputs(30, heads=1)
    q, k, v = (x[name].bfloat16().requires_grad_() for name in "qkv")
    x["f"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        h = mlstm_chunkwise(q, k, v, x["i"], x["f"], backend="triton")
    h.float().square().sum().backward()
    assert h.dtype == torch.bfloat16 and x["f"].grad.dtype == torch.float32
    assert q.grad.dtype == torch.bfloat16
    again = mlstm_chunkwise(q, k, v, x["i"], x["f"], backend="triton")
    assert torch.equal(h, again)


@pytest.mark.parametrize("size", [40.0, 1e4, 1e30])
def test_finite_input_never_gives_nan(size):
    for sign_i, sign_f in ((-1, -1), (1, -1), (1, 1)):
        x = make_inputs(40, heads=1, state=True)
        x["i"], x["f"] = sign_i * size * x["i"].abs(), sign_f * size * x["f"]
        x["q"][:, :, ::3] = 0.0
        for gate, eps in (("exp", 0.0), ("sigmoid", 1e-6)):
            got = run(kernel, x, torch.float32, chunk_size=16, gate=gate, eps=eps)
            for name, t in got.items():
                assert t.isfinite().all(), (name, gate, sign_i, sign_f)


def test_strided_inputs_and_a_second_backward():
    x = make_inputs(40)
    expected = run(kernel, x, torch.float32)
    arguments = [t.requires_grad_() for t in split(x)[0]]
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in arguments[:3]]
    strided += [t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in arguments[3:]]
    assert not any(t.is_contiguous() for t in strided)
    h = mlstm_chunkwise(*strided, backend="triton")
    torch.testing.assert_close(h, expected["h"], rtol=0, atol=0)
    upstream = torch.randn_like(h).transpose(2, 3).contiguous().transpose(2, 3)  # not readable
    kept = upstream.clone()
    first = torch.autograd.grad(h, arguments, upstream, retain_graph=True)
    second = torch.autograd.grad(h, arguments, upstream)
    assert torch.equal(upstream, kept)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("order", [(2, 0, 1, 3), (0, 2, 1, 3)], ids=["sequence", "batch"])
def test_gradients_lie_as_their_inputs_do(order):
    """So that what made q, k and v beside each other reads them without a copy."""
    x = make_inputs(40, b=2)
    back = [order.index(axis) for axis in range(4)]
    beside = {n: x[n].permute(order).contiguous().permute(back).requires_grad_() for n in "qkv"}
    plain = {n: x[n].requires_grad_() for n in "qkv"}
    got, expected = (
        torch.autograd.grad(
            kernel(x | inputs, chunk_size=16)["h"].square().sum(), [*inputs.values()]
        )
        for inputs in (beside, plain)
    )
    for name, d, e in zip("qkv", got, expected, strict=True):
        assert torch.equal(d, e) and d.stride() == beside[name].stride() != e.stride(), name


def test_offsets_beyond_32_bits():
    """Rows and batches more than 2^31 elements apart: most of this memory is never touched."""
    far = 2**31 // 256 - 16  # the largest stride that is not copied
    x = make_inputs(300, 8, 8, b=2, heads=1)
    expected = kernel(x, chunk_size=256)["h"]
    for name in "qkv":
        time = torch.empty(300 * far, dtype=torch.float32).as_strided(
            (1, 1, 300, 8), (0, 0, far, 1)
        )
        time.copy_(x[name][:1])
        got = kernel({n: t[:1] for n, t in x.items()} | {name: time}, chunk_size=256)["h"]
        assert torch.equal(got[0], expected[0]), name
        del time
    batch = torch.empty(2**31 + 4096).as_strided((2, 1, 300, 8), (2**31, 0, 8, 1))
    batch.copy_(x["v"])
    assert torch.equal(kernel(x | {"v": batch}, chunk_size=256)["h"], expected)


def operator_arguments(x, boundaries=None):
    arguments, state = split(x)
    state = state or (None, None, None)
    return (*arguments, *state, boundaries, True, 16, True, True, 1e-6, False, 15.0, None)


@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
def test_custom_op_rules(state):
    x = make_inputs(20, 16, 16, heads=1, state=state)
    for name, t in x.items():
        t.requires_grad_(name != "m0")
    boundaries = some_boundaries(20) if state else None
    torch.library.opcheck(
        chunkwise_triton.mlstm_forward, operator_arguments(x, boundaries),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


def test_compile_without_graph_breaks_and_recompute():
    x = make_inputs(20, 16, 16, heads=1)
    arguments = [t.requires_grad_() for t in split(x)[0]]

    def function(*arguments):
        return mlstm_chunkwise(*arguments, chunk_size=16, backend="triton")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = function(*arguments)
    grads = torch.autograd.grad(expected.square().sum(), arguments)
    for h in (compiled(*arguments), checkpoint(function, *arguments, use_reentrant=False)):
        assert torch.equal(h, expected)
        again = torch.autograd.grad(h.square().sum(), arguments)
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_steps_are_the_sequence(gate, normalize):
    x = make_inputs(5, 40, 70, gates="random +-15")
    options = {"gate": gate, "normalize": normalize, "gate_soft_cap": 12.0}
    expected = recurrence_with_cap({name: t.double() for name, t in x.items()}, **options)
    plain = recurrence_with_cap(x, **options)
    state = tuple(torch.zeros(1, 2, *d) for d in ((40, 70), (40,), ()))
    for t in range(5):
        one = [a[:, :, t] for a in split(x)[0]]
        h = mlstm_step(*one, state, backend="triton", **options)
        exact = expected["h"][:, :, t]
        assert relative_error(h, exact) < max(
            5e-6, 8 * relative_error(plain["h"][:, :, t], exact)
        )  # the limit of assert_float32_close
    for got, name in zip(state, "Cnm", strict=True):
        assert relative_error(got, expected[name]) < 5e-6


def test_step_in_bfloat16_with_strided_state():
    x = {name: t.bfloat16() for name, t in make_inputs(1, 16, 16, state=True).items()}
    one = [a[:, :, 0] for a in split(x)[0]]
    states = []
    for backend in ("torch", "triton"):
        state = tuple(t.clone() for t in split(x)[1])
        state = (state[0].mT.contiguous().mT, *state[1:])
        states.append((mlstm_step(*one, state, backend=backend), *state))
    for name, a, b in zip("hCnm", *states, strict=True):
        assert relative_error(b, a) < 1e-2, name


def test_the_step_is_an_operator_that_changes_its_state():
    x = make_inputs(1, 16, 20, state=True)
    one = [a[:, :, 0] for a in split(x)[0]]
    torch.library.opcheck(
        step_triton._step,
        (*one, *split(x)[1], "exp", True, 1e-6, 15.0),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_refused_calls_say_why():
    x = make_inputs(20)
    arguments, _ = split(x)
    with pytest.raises(ValueError, match=r"chunk_size=8 is below 16.*use one of 16, 32"):
        mlstm_chunkwise(*arguments, chunk_size=8, backend="triton")
    with pytest.raises(ValueError, match=r"float32 and bfloat16, not torch.float64"):
        mlstm_chunkwise(*(a.double() for a in arguments), backend="triton")
    wide = torch.zeros(1, 1, 2, 1025)
    with pytest.raises(ValueError, match=r"qk_dim=1025.*1024.*use more heads"):
        mlstm_chunkwise(wide, wide, wide, *torch.zeros(2, 1, 1, 2), backend="triton")
