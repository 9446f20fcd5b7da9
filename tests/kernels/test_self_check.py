"""What a run tries before it trains: sound kernels pass, planted faults are named."""

import pytest
import torch

from xlstm_kernels import mlstm_chunkwise, norm_beside, self_check, self_check_layers, slstm_scan
from xlstm_kernels.common.numba.tasks import FEWEST_ELEMENTS
from xlstm_kernels.mlstm.torch import chunkwise
from xlstm_kernels.mlstm.torch.passes import allocate_forward
from xlstm_kernels.self_check import check_lstm, check_mlstm, check_slstm
from xlstm_kernels.self_check_layers import (
    check_conv,
    check_gated_activation,
    check_loss,
    check_norm,
    check_norm_gated_skip,
    check_qkv_and_gates,
)

CONVOLVED = {"inner": 24, "heads": 3, "block": 4, "gates": 12, "width": 4}
ELEMENTWISE = [
    (check_gated_activation, {"width": 20, "activation": "silu"}),
    (check_gated_activation, {"width": 20, "activation": "gelu"}),
    (check_norm, {"width": 24, "kind": "rmsnorm", "eps": 1e-6}),
    (check_norm, {"width": 24, "kind": "layernorm", "eps": 1e-6}),
    (check_norm, {"width": 12, "heads": 3, "gated": True, "kind": "layernorm", "eps": 1e-6}),
    (check_loss, {"width": 70, "soft_cap": 30.0}),
    (check_loss, {"width": 70, "soft_cap": None}),
    (check_conv, {"channels": 10, "width": 4}),
    (check_conv, {"channels": 10, "width": 1}),
    (check_conv, {"channels": 10, "width": 4, "carried": True}),
    (check_lstm, {"head_dim": 16}),
    (check_qkv_and_gates, {"inner": 24, "heads": 3, "block": 4, "gates": 12}),
    (check_qkv_and_gates, CONVOLVED),
    (check_qkv_and_gates, CONVOLVED | {"carried": True}),
    (check_norm_gated_skip, {"width": 12, "heads": 3, "kind": "layernorm", "eps": 1e-6}),
    (check_norm, {"width": 24, "summed": True, "kind": "rmsnorm", "eps": 1e-6}),
    (check_norm, {"width": 24, "beside": True, "kind": "rmsnorm", "eps": 1e-6}),
]
# What the compiled loops take of these.
LARGE = [
    ("gated_activation", check_gated_activation, {"width": 32, "activation": "silu"}),
    ("multihead_norm", check_norm, {"width": 32, "kind": "rmsnorm", "eps": 1e-6}),
    ("softmax_gradient", check_loss, {"width": 32, "soft_cap": 30.0}),
    ("causal_conv1d", check_conv, {"channels": 32, "width": 4}),
    ("qkv_and_gates", check_qkv_and_gates, {"inner": 32, "heads": 2, "block": 4, "gates": 4}),
    (
        "norm_gated_skip",
        check_norm_gated_skip,
        {"width": 16, "heads": 2, "kind": "rmsnorm", "eps": 1e-6},
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"qk_dim": 16, "v_dim": 32},
        {"chunk_size": 16, "gate_soft_cap": 15.0, "eps": 1e-6},
        {"gate": "sigmoid", "normalize": False, "heads": 1},
        {"qk_dim": 16, "v_dim": 16, "carried": True, "states_dtype": torch.bfloat16},
    ],
)
def test_the_mlstm_agrees(dtype, options):
    assert check_mlstm("cpu", dtype, backend="torch", **options) == []


def test_the_reference_on_a_gpu_keeps_no_more_states_than_it_has_inputs(monkeypatch):
    kept = []

    def seen(q, v, *rest):
        h, last, saved = allocate_forward(q, v, *rest)
        if q.dtype == torch.float64:
            kept.append((saved.C_before.numel() + saved.weights.numel()) / (2 * q.numel()))
        return h, last, saved

    monkeypatch.setattr(chunkwise, "allocate_forward", seen)
    monkeypatch.setattr(self_check, "select_backend", lambda *_, **__: "triton")
    wide = {"qk_dim": 256, "v_dim": 256, "length": 1024, "backend": "torch"}
    assert check_mlstm("cpu", torch.float32, **wide) == []
    assert kept and max(kept) < 2


def test_a_wrong_last_state_is_named(monkeypatch):
    def planted(*inputs, return_last_state=False, **options):
        h, (C, n, m) = mlstm_chunkwise(*inputs, return_last_state=True, **options)
        C = torch.cat((0 * C[..., :2], C[..., 2:]), dim=-1)
        return (h, (C, n, m)) if return_last_state else h

    monkeypatch.setattr(self_check, "mlstm_chunkwise", planted)
    (found,) = check_mlstm("cpu", torch.float32, qk_dim=16, v_dim=32)
    assert "mlstm_chunkwise on cpu in float32, last state: off by" in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_the_slstm_agrees(dtype, forget_gate):
    found = check_slstm("cpu", dtype, head_dim=16, backend="torch", forget_gate=forget_gate)
    assert found == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("check", "options"), ELEMENTWISE)
def test_the_other_kernels_agree(check, options, dtype):
    assert check("cpu", dtype, backend="torch", **options) == []


@pytest.mark.parametrize(
    ("name", "check", "options", "named"),
    [
        ("gated_activation", *ELEMENTWISE[0], "gated_activation on cpu in float32, result"),
        ("multihead_norm", *ELEMENTWISE[2], "multihead_norm on cpu in float32, result"),
        ("multihead_norm", *ELEMENTWISE[4], "multihead_norm on cpu in float32, gradient of gate"),
        ("softmax_gradient", *ELEMENTWISE[5], "cross_entropy on cpu in float32, gradient of log"),
        ("causal_conv1d", *ELEMENTWISE[7], "causal_conv1d on cpu in float32, gradient of weight"),
        ("lstm_scan", *ELEMENTWISE[10], "lstm_scan on cpu in float32, hidden states"),
    ],
)
def test_a_wrong_kernel_of_the_others_is_named(name, check, options, named, monkeypatch):
    module = self_check if check is check_lstm else self_check_layers
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *x, **options: 1.1 * right(*x, **options))
    problems = check("cpu", torch.float32, backend="torch", **options)
    assert any(one.startswith(named) for one in problems), problems


@pytest.mark.parametrize(("name", "check", "options"), LARGE)
def test_a_run_with_large_tensors_on_a_cpu_has_its_compiled_loops_compared(
    name, check, options, monkeypatch
):
    """What is asked for with a few rows is what a call with all tokens would choose."""
    pytest.importorskip("numba", reason="the extra cpu (numba) is not installed")
    asked = []
    right = getattr(self_check_layers, name)

    def seen(*inputs, backend, **more):
        asked.append(backend)
        return right(*inputs, backend=backend, **more)

    monkeypatch.setattr(self_check_layers, name, seen)
    assert check("cpu", torch.float32, **options) == []
    assert check("cpu", torch.float32, tokens=FEWEST_ELEMENTS // 32, **options) == []
    assert asked == ["torch", "numba"]


def test_a_norm_that_forgets_the_gradient_beside_it_is_named(monkeypatch):
    def planted(x, *rest, **options):
        return x.detach(), norm_beside(x, *rest, **options)[1]

    monkeypatch.setattr(self_check_layers, "norm_beside", planted)
    check, options = ELEMENTWISE[-1]
    (found,) = check("cpu", torch.float32, backend="torch", **options)
    assert "norm_beside on cpu in float32, gradient of input: off by" in found


class WrongGradient(torch.autograd.Function):
    """The identity, with a gradient that is a tenth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.1 * gradient


def forgets_boundaries(*inputs, boundaries, **options):
    return mlstm_chunkwise(*inputs, **options)


def loses_its_state(*inputs, boundaries, **options):
    """Late in the row, as where a segment of the sequence forgets the ones before it."""
    late = boundaries.clone()
    late[:, 3 * boundaries.shape[1] // 4] = True
    return mlstm_chunkwise(*inputs, boundaries=late, **options)


def wrong_gradient_of_k(q, k, *rest, **options):
    return mlstm_chunkwise(q, WrongGradient.apply(k), *rest, **options)


def not_a_number(q, k, v, *rest, **options):
    return mlstm_chunkwise(q, k, v * torch.nan, *rest, **options)


@pytest.mark.parametrize(
    ("planted", "named"),
    [
        (forgets_boundaries, ["hidden states", "gradient of q", "gradient of v"]),
        (loses_its_state, ["hidden states", "gradient of q", "gradient of forget gate"]),
        (wrong_gradient_of_k, ["gradient of k"]),
        (not_a_number, ["hidden states", "gradient of q"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_mlstm_kernel_is_named_with_its_tensor(planted, named, dtype, monkeypatch):
    monkeypatch.setattr(self_check, "mlstm_chunkwise", planted)
    problems = check_mlstm("cpu", dtype, qk_dim=16, v_dim=16, backend="torch")
    assert problems
    for text in named:
        assert any(f"mlstm_chunkwise on cpu in {str(dtype)[6:]}, {text}" in p for p in problems)
    if planted is wrong_gradient_of_k:
        assert len(problems) == 1


def test_a_wrong_slstm_kernel_is_named(monkeypatch):
    def planted(gates, weight, bias, **options):
        return slstm_scan(gates, weight.transpose(-1, -2), bias, **options)

    monkeypatch.setattr(self_check, "slstm_scan", planted)
    problems = check_slstm("cpu", torch.float32, head_dim=16, backend="torch")
    assert any("slstm_scan on cpu in float32, hidden states: off by" in one for one in problems)
