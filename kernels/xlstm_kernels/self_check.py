"""Do the kernels compute what they should on this device? A comparison with fp64 references.

A kernel that was never tried on a kind of GPU, a driver that miscompiles it, or a device that is
broken can all give numbers that look like numbers. Each check runs one kernel forward and backward
on a short sequence, on the device and with the backend that a run would use, and compares the
result and every gradient with the equations in fp64 on the CPU (for cells the step recurrence). The
inputs are values that the dtype can hold, so what differs is the kernel's own rounding.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.conv import causal_conv1d
from xlstm_kernels.cross_entropy import softmax_gradient, softmax_statistics
from xlstm_kernels.gated import gated_activation
from xlstm_kernels.mlstm import mlstm_chunkwise
from xlstm_kernels.mlstm.arguments import soft_cap
from xlstm_kernels.mlstm.reference import mlstm_recurrence
from xlstm_kernels.norm import add_norm, multihead_norm
from xlstm_kernels.slstm import lstm_scan, slstm_scan
from xlstm_kernels.slstm.arguments import cell_of
from xlstm_kernels.slstm.reference import lstm_recurrence, slstm_recurrence

#: The largest error that is accepted, as a fraction of the largest value of the reference. A wrong
#: kernel is off by more than a tenth; rounding in bf16 stays below a hundredth.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def check_mlstm(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    qk_dim: int = 64,
    v_dim: int = 128,
    heads: int = 2,
    chunk_size: int | None = None,
    gate_soft_cap: float | None = None,
    states_dtype: torch.dtype | None = None,
    backend: str | None = None,
    **options: Any,
) -> list[str]:
    """What is wrong with `mlstm_chunkwise` on a device.

    Args:
        device: Where the kernel runs.
        dtype: Of queries, keys and values.
        qk_dim: Width of a head's queries and keys.
        v_dim: Width of a head's values.
        heads: Number of heads.
        chunk_size: As for the kernel; the sequence is a chunk and a half.
        gate_soft_cap: As for the kernel.
        states_dtype: As for the kernel.
        backend: As for the kernel; None for the one that a run would use.
        options: Further options that the reference has too: `gate`, `normalize`, `eps`.

    Returns:
        One sentence for each tensor that differs; empty when all agree.
    """
    length = 3 * (chunk_size or 64) // 2
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, heads, length, *shape, generator=generator).to(dtype)

    inputs = {"q": draw(qk_dim), "k": draw(qk_dim), "v": draw(v_dim)}
    inputs |= {"input gate": draw(), "forget gate": draw() + 2}
    starts = _two_documents(length)

    def kernel(*tensors: Tensor) -> Tensor:
        return mlstm_chunkwise(
            *tensors,
            boundaries=starts.to(device),
            chunk_size=chunk_size,
            gate_soft_cap=gate_soft_cap,
            states_dtype=states_dtype,
            backend=backend,
            **options,
        )

    def reference(*tensors: Tensor) -> Tensor:
        q, k, v, *gates = tensors
        gates = [soft_cap(gate, gate_soft_cap, q) for gate in gates]
        return mlstm_recurrence(q, k, v, *gates, boundaries=starts, **options)[0]

    return _compare("mlstm_chunkwise", kernel, reference, inputs, device, dtype)


def check_slstm(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    head_dim: int = 64,
    heads: int = 2,
    backend: str | None = None,
    **gates: str,
) -> list[str]:
    """What is wrong with `slstm_scan` on a device; as `check_mlstm`.

    Large heads are replayed as graphs of the GPU, of more steps than the comparison has: these are
    compared with single launches.

    Args:
        device: Where the kernel runs.
        dtype: Of the gate pre-activations; weights are float32, as in a run.
        head_dim: Width of a head.
        heads: Number of heads.
        backend: As for the kernel; None for the one that a run would use.
        gates: `forget_gate` and `input_gate`, as for the kernel.
    """

    def kernel(*tensors: Tensor, starts: Tensor) -> Tensor:
        return slstm_scan(*tensors, boundaries=starts, backend=backend, **gates)

    def reference(*tensors: Tensor, starts: Tensor) -> Tensor:
        return slstm_recurrence(*tensors, boundaries=starts, **gates)[0]

    problems = _compare_scans("slstm_scan", kernel, reference, device, dtype, head_dim, heads)
    like = torch.empty(0, device=device, dtype=dtype)
    cell = cell_of(gates.get("input_gate", "exp"))
    if select_backend("slstm_scan", backend, like, d=head_dim, cell=cell) == "triton":
        from xlstm_kernels.slstm.triton.graph_check import check_graphs

        problems += check_graphs(like, head_dim, heads, gates.get("forget_gate", "sigmoid"))
    return problems


def check_lstm(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    head_dim: int = 64,
    heads: int = 2,
    backend: str | None = None,
) -> list[str]:
    """What is wrong with `lstm_scan` on a device; as `check_slstm`."""

    def kernel(*tensors: Tensor, starts: Tensor) -> Tensor:
        return lstm_scan(*tensors, boundaries=starts, backend=backend)

    def reference(*tensors: Tensor, starts: Tensor) -> Tensor:
        return lstm_recurrence(*tensors, boundaries=starts)[0]

    return _compare_scans("lstm_scan", kernel, reference, device, dtype, head_dim, heads)


def _compare_scans(
    name: str,
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    heads: int,
) -> list[str]:
    length = 24
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "gates": draw(1, length, 4, heads, head_dim).to(dtype),
        "recurrent weight": draw(4, heads, head_dim, head_dim) / head_dim**0.5,
        "bias": draw(4, heads, head_dim),
    }
    starts = _two_documents(length)
    on_device = partial(kernel, starts=starts.to(device))
    return _compare(name, on_device, partial(reference, starts=starts), inputs, device, dtype)


def check_conv(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    channels: int,
    width: int,
    backend: str | None = None,
) -> list[str]:
    """What is wrong with `causal_conv1d`, with SiLU, on a device; as `check_mlstm`.

    Args:
        device: Where the kernel runs.
        dtype: Of input, weight and bias.
        channels: Their number.
        width: Taps.
        backend: As for the kernel; None for the one that a run would use.
    """
    starts = _two_documents(7)

    def kernel(x: Tensor, *weights: Tensor) -> Tensor:
        return causal_conv1d(
            x[None], *weights, activation="silu", boundaries=starts.to(device), backend=backend
        )[0]

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        document = starts[0].cumsum(0)
        rows = []
        for t in range(len(x)):
            taps = [j for j in range(width) if t >= j and document[t - j] == document[t]]
            rows.append(sum((weight[:, width - 1 - j] * x[t - j] for j in taps), bias))
        return F.silu(torch.stack(rows))

    inputs = {
        "input": _draw(channels),
        "weight": _draw(channels, width).t(),
        "bias": _draw(channels)[0],
    }
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    return _compare("causal_conv1d", kernel, reference, inputs, device, dtype, "result")


def check_gated_activation(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    width: int,
    activation: str,
    backend: str | None = None,
) -> list[str]:
    """What is wrong with `gated_activation` on a device; as `check_mlstm`.

    Args:
        device: Where the kernel runs.
        dtype: Of the packed projection.
        width: Width of each half.
        activation: As for the kernel.
        backend: As for the kernel; None for the one that a run would use.
    """

    def kernel(x: Tensor) -> Tensor:
        return gated_activation(x, activation, backend=backend)

    def reference(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate)) * up

    inputs = {"gate and up": _draw(2 * width).to(dtype)}
    return _compare("gated_activation", kernel, reference, inputs, device, dtype, "result")


def check_norm(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    width: int,
    kind: str,
    eps: float,
    heads: int = 1,
    gated: bool = False,
    summed: bool = False,
    backend: str | None = None,
) -> list[str]:
    """What is wrong with `multihead_norm`, or `add_norm`, on a device; as `check_mlstm`.

    Args:
        device: Where the kernel runs.
        dtype: Of input, weight and gate.
        width: Of a head. The norm of a block has one head as wide as the model.
        kind: As for the kernel.
        eps: As for the kernel.
        heads: Number of heads.
        gated: Whether there is an output gate.
        summed: Whether it is `add_norm` of one head, whose sum is compared as well.
        backend: "torch", or None for the one that a run would use.
    """
    own = "torch" if backend == "torch" else None

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, width))

    def kernel(x: Tensor, weight: Tensor, *gate: Tensor) -> Tensor:
        if summed:
            return torch.cat(add_norm(x, gate[0], weight, kind, eps, backend=own), dim=-1)
        opened = by_head(gate[0]) if gate else None
        return multihead_norm(by_head(x), weight, kind, eps, gate=opened, backend=own).flatten(-2)

    def reference(x: Tensor, weight: Tensor, *gate: Tensor) -> Tensor:
        x = by_head(x + gate[0] if summed else x)
        if kind == "layernorm":
            centered = x - x.mean(-1, keepdim=True)
        else:
            centered = x
        inverse = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
        y = (centered * inverse).flatten(-2) * weight
        if summed:
            return torch.cat((x.flatten(-2), y), dim=-1)
        return y * gate[0].sigmoid() if gate else y

    inputs = {"input": _draw(heads * width), "weight": _draw(heads * width)[0]}
    second = "gate" if gated else "added"
    inputs |= {second: _draw(heads * width).flip(0)} if gated or summed else {}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    name = "add_norm" if summed else "multihead_norm"
    return _compare(name, kernel, reference, inputs, device, dtype, "result")


class _Loss(torch.autograd.Function):
    """A cross entropy over one part of a vocabulary that is the whole."""

    @staticmethod
    def forward(ctx, logits, labels, cap, backend):
        shift, total, chosen = softmax_statistics(logits, labels, cap, backend=backend)
        ctx.save_for_backward(logits, labels, total.log() + shift)
        ctx.options = cap, backend
        return total.log() + shift - chosen

    @staticmethod
    def backward(ctx, grad):
        logits, labels, log_total = ctx.saved_tensors
        cap, backend = ctx.options
        d = softmax_gradient(logits.clone(), labels, log_total, grad, cap, backend=backend)
        return d, None, None, None


def check_loss(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    width: int,
    soft_cap: float | None,
    backend: str | None = None,
) -> list[str]:
    """What is wrong with `softmax_statistics` and `softmax_gradient`; as `check_mlstm`.

    Args:
        device: Where the kernels run.
        dtype: Of the logits.
        width: Of the vocabulary.
        soft_cap: As for the kernels.
        backend: As for the kernels; None for the one that a run would use.
    """
    logits = (8 * _draw(width)).to(dtype)
    labels = torch.arange(len(logits)) * 12345 % width

    def kernel(x: Tensor) -> Tensor:
        return _Loss.apply(x, labels.to(device), soft_cap, backend)

    def reference(x: Tensor) -> Tensor:
        y = x if soft_cap is None else soft_cap * torch.tanh(x / soft_cap)
        return F.cross_entropy(y, labels, reduction="none")

    inputs = {"logits": logits}
    return _compare("cross_entropy", kernel, reference, inputs, device, dtype, "losses")


def _draw(width: int, rows: int = 7) -> Tensor:
    """A few rows of random numbers, the same in every run."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def _two_documents(length: int) -> Tensor:
    """Boundaries `[1, length]` of a row with two documents."""
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[:, [0, length // 3]] = True
    return starts


def _compare(
    name: str,
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
    result: str = "hidden states",
) -> list[str]:
    """One sentence for each tensor in which the kernel and the reference differ."""
    upstream = None
    found: list[list[Tensor]] = []
    for function, where, kind in ((reference, "cpu", torch.float64), (kernel, device, None)):
        given = [x.to(where, kind or x.dtype).requires_grad_() for x in inputs.values()]
        h = function(*given)
        if upstream is None:
            generator = torch.Generator().manual_seed(1)
            upstream = torch.randn(h.shape, generator=generator).to(dtype)
        gradients = torch.autograd.grad(h, given, upstream.to(h.device, h.dtype))
        found.append([one.detach().cpu().double() for one in (h, *gradients)])
    names = [result, *(f"gradient of {one}" for one in inputs)]
    problems = []
    for what, expected, got in zip(names, *found, strict=True):
        error = ((got - expected).abs().max() / expected.abs().max()).item()
        if not error <= LIMITS[dtype]:  # nan is worse than any number
            problems.append(
                f"{name} on {device} in {str(dtype).removeprefix('torch.')}, {what}: off by "
                f"{error:.1e} of the largest value of the fp64 reference (at most "
                f"{LIMITS[dtype]:.0e})"
            )
    return problems
