"""Any shape, gates, boundaries, chunk size and state, against the float64 step recurrences.

Hypothesis draws the sizes and a seed, torch the numbers. Examples are the same in every run.
"""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from tests.kernels.comparison import assert_float32_close, assert_same, run
from xlstm_kernels import causal_conv1d, mlstm_chunkwise, slstm_scan
from xlstm_kernels.mlstm.reference import mlstm_recurrence
from xlstm_kernels.slstm.reference import slstm_recurrence

LIMIT = 1e-10
few = settings(max_examples=25, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 2**31 - 1)
# Shift of the input gate, shift of the forget gate, spread of both.
gates = st.sampled_from([(0, 3, 1), (-10, 6, 0.1), (0, -15, 1), (0, 0, 15), (15, 15, 0)])
density = st.sampled_from([None, 0.0, 0.1, 0.5, 1.0])  # of boundaries


def draw_boundaries(b, s, density):
    return None if density is None else torch.rand(b, s) < density


@few
@given(
    b=st.integers(1, 3),
    heads=st.integers(1, 3),
    s=st.integers(1, 70),
    qk=st.integers(1, 9),
    v=st.integers(1, 9),
    gates=gates,
    density=density,
    chunk_size=st.one_of(st.none(), st.integers(1, 80)),
    state=st.booleans(),
    gate=st.sampled_from(["exp", "sigmoid"]),
    normalize=st.booleans(),
    seed=seeds,
)
def test_mlstm(b, heads, s, qk, v, gates, density, chunk_size, state, gate, normalize, seed):
    torch.manual_seed(seed)
    igate, fgate, spread = gates
    inputs = {name: torch.randn(b, heads, s, d) for name, d in (("q", qk), ("k", qk), ("v", v))}
    inputs["i"] = spread * torch.randn(b, heads, s) + igate
    inputs["f"] = spread * torch.randn(b, heads, s) + fgate
    if state:
        inputs |= {"C0": torch.randn(b, heads, qk, v), "n0": torch.randn(b, heads, qk)}
        inputs["m0"] = torch.randn(b, heads)

    def outputs(function, **more):
        def call(x, **options):
            carried = (x["C0"], x["n0"], x["m0"]) if state else None
            h, last = function(*(x[name] for name in "qkvif"), carried, **options, **more)
            return {"h": h} | dict(zip("Cnm", last, strict=True))

        return call

    options = {"gate": gate, "normalize": normalize}
    options["boundaries"] = draw_boundaries(b, s, density)
    chunkwise = outputs(mlstm_chunkwise, chunk_size=chunk_size, return_last_state=True)
    expected = run(outputs(mlstm_recurrence), inputs, torch.float64, **options)
    assert_same(run(chunkwise, inputs, torch.float64, **options), expected, LIMIT)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@few
@given(
    b=st.integers(1, 6),
    heads=st.integers(1, 3),
    s=st.integers(1, 40),
    d=st.integers(1, 20),
    gates=gates,
    density=density,
    state=st.booleans(),
    forget_gate=st.sampled_from(["sigmoid", "exp"]),
    seed=seeds,
)
def test_slstm(backend, b, heads, s, d, gates, density, state, forget_gate, seed):
    if backend == "numba" and importlib.util.find_spec("numba") is None:
        pytest.skip("the extra cpu (numba) is not installed")
    torch.manual_seed(seed)
    igate, fgate, spread = gates
    x = torch.randn(b, s, 4, heads, d)
    x[:, :, 0], x[:, :, 1] = spread * x[:, :, 0] + igate, spread * x[:, :, 1] + fgate
    inputs = {"x": x, "R": torch.randn(4, heads, d, d) * 0.5 * d**-0.5}
    inputs["b"] = torch.randn(4, heads, d) * 0.3
    if state:
        inputs |= {name: torch.randn(b, heads, d) for name in ("h0", "c0", "m0")}
        inputs["n0"] = torch.rand(b, heads, d) + 0.5

    def outputs(function, **more):
        def call(x, **options):
            carried = tuple(x[name] for name in ("h0", "c0", "n0", "m0")) if state else None
            h, last = function(x["x"], x["R"], x["b"], carried, **options, **more)
            return {"h": h} | dict(zip(("h_last", "c", "n", "m"), last, strict=True))

        return call

    options = {"forget_gate": forget_gate, "boundaries": draw_boundaries(b, s, density)}
    scan = outputs(slstm_scan, return_last_state=True, backend=backend)
    if backend == "numba":
        assert_float32_close(scan, outputs(slstm_recurrence), inputs, **options)
        return
    expected = run(outputs(slstm_recurrence), inputs, torch.float64, **options)
    assert_same(run(scan, inputs, torch.float64, **options), expected, LIMIT)


def conv_recurrence(x, weight, bias, state, boundaries):
    """One token at a time: the window of the last inputs moves on."""
    ys = []
    for t in range(x.shape[1]):
        if boundaries is not None:
            state = state.masked_fill(boundaries[:, t, None, None], 0)
        window = torch.cat([state, x[:, t, :, None]], -1)
        ys.append((window * weight).sum(-1) + (0 if bias is None else bias))
        state = window[..., 1:]
    return torch.stack(ys, 1), state


@few
@given(
    b=st.integers(1, 3),
    s=st.integers(1, 20),
    c=st.integers(1, 5),
    width=st.integers(1, 6),
    density=density,
    state=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
    seed=seeds,
)
def test_conv(b, s, c, width, density, state, bias, activation, seed):
    torch.manual_seed(seed)
    inputs = {"x": torch.randn(b, s, c), "weight": torch.randn(c, width)}
    if bias:
        inputs["bias"] = torch.randn(c)
    if state:
        inputs["state"] = torch.randn(b, c, width - 1)
    boundaries = draw_boundaries(b, s, density)

    def recurrence(x):
        before = x["state"] if state else x["x"].new_zeros(b, c, width - 1)
        y, last = conv_recurrence(x["x"], x["weight"], x.get("bias"), before, boundaries)
        return {"y": silu(y) if activation else y, "last": last}

    def conv(x):
        options = {"activation": activation, "boundaries": boundaries, "return_last_state": True}
        arguments = x["x"], x["weight"], x.get("bias"), x.get("state")
        return dict(zip(("y", "last"), causal_conv1d(*arguments, **options), strict=True))

    used = {name: x for name, x in inputs.items() if x.numel()}
    empty = {name: x.double() for name, x in inputs.items() if not x.numel()}
    expected = run(lambda x: nonempty(recurrence(x | empty)), used, torch.float64)
    assert_same(run(lambda x: nonempty(conv(x | empty)), used, torch.float64), expected, LIMIT)


def nonempty(outputs):
    """Without the state of a convolution of width 1."""
    return {name: x for name, x in outputs.items() if x.numel()}
