"""Do the kernels compute what they should on this device? A comparison with fp64 references.

A kernel that was never tried on a kind of GPU, a driver that miscompiles it, or a device that is
broken can all give numbers that look like numbers. Each check runs one kernel forward and backward
on a short sequence, on the device and with the backend that a run would use, and compares the
result and every gradient with the equations in fp64 on the CPU (for cells the step recurrence). The
inputs are values that the dtype can hold, so what differs is the kernel's own rounding.

This module compares the cells; `self_check_layers` compares the kernels around them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.mlstm import mlstm_chunkwise
from xlstm_kernels.mlstm.arguments import soft_cap
from xlstm_kernels.mlstm.reference import mlstm_recurrence
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
    starts = two_documents(length)

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

    return compare("mlstm_chunkwise", kernel, reference, inputs, device, dtype)


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
    starts = two_documents(length)
    on_device = partial(kernel, starts=starts.to(device))
    return compare(name, on_device, partial(reference, starts=starts), inputs, device, dtype)


def two_documents(length: int) -> Tensor:
    """Boundaries `[1, length]` of a row with two documents."""
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[:, [0, length // 3]] = True
    return starts


def compare(
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
