"""Forward-mode differentiation raises or is right, for every public function and backend.

A custom operator without a formula for it would return zero. Those on Triton are called by
`tests/kernels/triton/test_forward_mode.py`.
"""

import importlib.util

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import xlstm_kernels
from xlstm_kernels import (
    add_norm,
    causal_conv1d,
    conv_qkv_and_gates,
    gated_activation,
    gated_activation_again,
    gated_skip,
    lstm_scan,
    lstm_step,
    mlstm_chunkwise,
    mlstm_step,
    multihead_norm,
    multihead_norm_again,
    norm_beside,
    norm_gated_skip,
    norm_gated_skip_again,
    qkv_and_gates,
    slstm_scan,
    slstm_step,
    softmax_gradient,
    softmax_statistics,
)
from xlstm_kernels.common.backends import BACKENDS

B, HEADS, S, D = 2, 2, 8, 16
# Whose backends are those of another function.
REGISTERED = {
    "lstm_scan": "slstm_scan",
    "add_norm": "multihead_norm",
    "norm_beside": "multihead_norm",
    "norm_gated_skip": "multihead_norm",
    "conv_qkv_and_gates": "qkv_and_gates",
    "softmax_statistics": "cross_entropy",
    "softmax_gradient": "cross_entropy",
}
UNREGISTERED = {
    "lstm_step": ["torch"],
    "multihead_norm_again": ["triton"],
    "norm_gated_skip_again": ["triton"],
    "gated_activation_again": ["triton"],
}


def pairs(*backends):
    """(function, backend) of every public function that has one of these backends."""
    return [
        (name, backend)
        for name in xlstm_kernels.__all__
        for backend in UNREGISTERED.get(name)
        or [one.name for one in BACKENDS[REGISTERED.get(name, name)]]
        if backend in backends
    ]


def kernel_calls(dtype):
    """A call and its inputs for every public function, by name."""
    generator = torch.Generator().manual_seed(3)
    width, tokens = HEADS * D, S * B

    def new(**shapes):
        made = {k: torch.randn(*v, generator=generator).to(dtype) for k, v in shapes.items()}
        return made | ({"labels": torch.arange(tokens) % D} if "logits" in shapes else {})

    head = {"q": (B, HEADS, S, D), "k": (B, HEADS, S, D), "v": (B, HEADS, S, D)}
    token = {name: (B, HEADS, D) for name in "qkv"}
    memory = {"C": (B, HEADS, D, D), "n": (B, HEADS, D), "m": (B, HEADS)}
    state = {name: (B, HEADS, D) for name in "hcnm"}
    matrices = {"R": (4, HEADS, D, D), "bias": (4, HEADS, D)}
    rows = {"x": (tokens, width), "weight": (width,)}
    by_head = {"x": (B, HEADS, S, D), "weight": (width,), "gate": (B, HEADS, S, D)}
    skip = {"skip": (width,), "x": (S, B, width), "gate": (S, B, width)}
    blocks = {"blocks": (3 * width // 4, 4, 4), "gates": (2 * HEADS, 3 * width)}
    conv = {"weight": (D, 4), "bias": (D,), "state": (B, D, 3)}
    logits, of_rows = {"logits": (tokens, D)}, {"log_total": (tokens,), "grad": (tokens,)}
    norm = "layernorm", 1e-5
    return {
        "mlstm_chunkwise": (
            lambda q, k, v, i, f, C, n, m, **o: mlstm_chunkwise(q, k, v, i, f, (C, n, m), **o),
            new(**head, i=(B, HEADS, S), f=(B, HEADS, S), **memory),
        ),
        "mlstm_step": (
            lambda q, k, v, i, f, C, n, m, **o: mlstm_step(q, k, v, i, f, (C, n, m), **o),
            new(**token, i=(B, HEADS), f=(B, HEADS), **memory),
        ),
        "slstm_scan": (
            lambda x, R, bias, h, c, n, m, **o: slstm_scan(x, R, bias, (h, c, n, m), **o),
            new(x=(B, S, 4, HEADS, D), **matrices, **state),
        ),
        "slstm_step": (
            lambda x, R, bias, h, c, n, m, **o: slstm_step(x, R, bias, (h, c, n, m), **o),
            new(x=(B, 4, HEADS, D), **matrices, **state),
        ),
        "lstm_scan": (
            lambda x, R, bias, h, c, **o: lstm_scan(x, R, bias, (h, c), **o),
            new(x=(B, S, 4, HEADS, D), **matrices, h=state["h"], c=state["c"]),
        ),
        "lstm_step": (
            lambda x, R, bias, h, c, backend: lstm_step(x, R, bias, (h, c)),
            new(x=(B, 4, HEADS, D), **matrices, h=state["h"], c=state["c"]),
        ),
        "causal_conv1d": (
            lambda x, weight, bias, state, **o: causal_conv1d(x, weight, bias, state, **o),
            new(x=(B, S, D), **conv),
        ),
        "multihead_norm": (
            lambda x, weight, gate, **o: multihead_norm(
                x, weight, *norm, gate=gate, layout="by head", **o
            ),
            new(**by_head),
        ),
        "multihead_norm_again": (
            lambda d_y, x, weight, gate, backend: multihead_norm_again(
                d_y, x, weight, *norm, gate
            ),
            new(d_y=(tokens, width), **by_head),
        ),
        "add_norm": (
            lambda x, added, weight, **o: add_norm(x, added, weight, *norm, **o),
            new(**rows, added=rows["x"]),
        ),
        "norm_beside": (
            lambda x, weight, **o: norm_beside(x, weight, *norm, **o),
            new(**rows),
        ),
        "norm_gated_skip": (
            lambda h, weight, skip, x, gate, **o: norm_gated_skip(
                h, weight, *norm, skip, x, gate, **o
            ),
            new(h=(B, HEADS, S, D), weight=(width,), **skip),
        ),
        "norm_gated_skip_again": (
            lambda d_y, h, weight, skip, x, gate, backend: norm_gated_skip_again(
                d_y, h, weight, *norm, skip, x, gate
            ),
            new(d_y=(S, B, width), h=(B, HEADS, S, D), weight=(width,), **skip),
        ),
        "gated_activation": (
            lambda x, **o: gated_activation(x, "silu", **o),
            new(x=(tokens, 2 * width)),
        ),
        "gated_activation_again": (
            lambda d_y, x, backend: gated_activation_again(d_y, x, "silu"),
            new(d_y=(tokens, width), x=(tokens, 2 * width)),
        ),
        "gated_skip": (
            lambda h, skip, x, gate, **o: gated_skip(h, skip, x, gate, **o),
            new(h=(S, B, width), **skip),
        ),
        "qkv_and_gates": (
            lambda x, v, blocks, gates, **o: qkv_and_gates(x, v, blocks, gates, HEADS, **o),
            new(x=(B, S, width), v=(B, S, width), **blocks),
        ),
        "conv_qkv_and_gates": (
            lambda x, weight, bias, blocks, gates, **o: conv_qkv_and_gates(
                x, weight, bias, blocks, gates, HEADS, **o
            ),
            new(
                x=(B, S, 2 * width), weight=(width, 4), bias=(width,), **blocks,
            ),
        ),
        "softmax_statistics": (
            lambda logits, labels, **o: softmax_statistics(logits, labels, 30.0, **o),
            new(**logits),
        ),
        "softmax_gradient": (
            lambda logits, labels, log_total, grad, **o: softmax_gradient(
                logits, labels, log_total, grad, 30.0, **o
            ),
            new(**logits, **of_rows),
        ),
    }  # fmt: skip


def check_forward_mode(name, backend):
    """A tangent of any input raises, or results in that of the finite difference."""
    call, inputs = kernel_calls(torch.float64 if backend == "torch" else torch.float32)[name]
    for key in inputs:
        x = inputs[key]
        if not x.is_floating_point():
            continue

        def along(value, key=key):
            given = {other: one.clone() for other, one in inputs.items()} | {key: value}
            return tree_leaves(call(**given, backend=backend))

        tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(x.dtype)
        try:
            with forward_ad.dual_level():
                results = along(forward_ad.make_dual(x.clone(), tangent))
                got = [forward_ad.unpack_dual(y).tangent for y in results]
        except NotImplementedError as error:
            assert "has no forward-mode derivative; use backward()" in str(error)
            with pytest.raises(NotImplementedError, match="forward-mode"):
                torch.func.jvp(along, (x,), (tangent,))
            continue
        ahead, behind = (along(x + step * tangent) for step in (1e-6, -1e-6))
        for one, a, b in zip(got, ahead, behind, strict=True):
            one = torch.zeros_like(a) if one is None else one
            torch.testing.assert_close(one, (a - b) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "backend"), pairs("torch", "numba"))
def test_a_tangent_raises_or_is_right(name, backend):
    if backend == "numba" and importlib.util.find_spec("numba") is None:
        pytest.skip("the extra cpu (numba) is not installed")
    check_forward_mode(name, backend)


def test_every_registered_function_is_called():
    assert {REGISTERED.get(name, name) for name, _ in pairs("torch")} >= set(BACKENDS)
