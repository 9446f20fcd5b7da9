"""Do the kernels compute what they should on this device? A comparison with fp64 references.

A kernel that was never tried on a kind of GPU, a driver that miscompiles it, or a device that is
broken can all give numbers that look like numbers. Each check runs one kernel forward and backward,
on the device and with the backend that a run would use, and compares the result and every gradient
with the equations in fp64. The inputs are values that the dtype can hold, so what differs is the
kernel's own rounding.

Triton compiles a kernel for sizes, strides and dtypes of a call. So there the cells take a call as
large as the run's, and the kernels around them so many rows that their loops go round. Other
backends have one binary, and take a short sequence.

This module compares the cells; `self_check_layers` compares the kernels around them.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.mlstm import mlstm_chunkwise
from xlstm_kernels.mlstm.arguments import State, soft_cap
from xlstm_kernels.mlstm.reference import mlstm_recurrence
from xlstm_kernels.mlstm.torch.chunkwise import mlstm_chunkwise_torch
from xlstm_kernels.slstm import lstm_scan, slstm_scan
from xlstm_kernels.slstm.arguments import cell_of
from xlstm_kernels.slstm.reference import lstm_recurrence, slstm_recurrence

#: The largest error that is accepted, as a fraction of the reference: of their largest values, and
#: of their norms. A wrong kernel is off by more than a tenth; rounding in bf16 stays below a
#: hundredth.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def check_mlstm(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    qk_dim: int = 64,
    v_dim: int = 128,
    rows: int = 1,
    heads: int = 2,
    length: int | None = None,
    order: str = "gbhs",
    carried: bool = False,
    chunk_size: int | None = None,
    gate_soft_cap: float | None = None,
    states_dtype: torch.dtype | None = None,
    backend: str | None = None,
    **options: Any,
) -> list[str]:
    """What is wrong with `mlstm_chunkwise` on a device.

    Two sequences are drawn. The heads of all rows have the one or the other in turn, so the
    reference computes two, however many there are. It is the step recurrence on the CPU. For calls
    as large as a run's that would take minutes and more memory than there is: they are compared
    with the PyTorch implementation in fp64 on the device itself.

    Args:
        device: Where the kernel runs.
        dtype: Of queries, keys and values.
        qk_dim: Width of a head's queries and keys.
        v_dim: Width of a head's values.
        rows: Of the batch, on Triton; 1 elsewhere.
        heads: Number of heads, on Triton; 1 elsewhere.
        length: Tokens of a row, on Triton. None, and elsewhere: a chunk and a half.
        order: How the two gates g of a run lie in memory, by batch, heads and s, the innermost
            last. The heads of q, k and v lie likewise.
        carried: Whether the rows go on from a state, as on a rank of context parallelism.
        chunk_size: As for the kernel.
        gate_soft_cap: As for the kernel.
        states_dtype: As for the kernel.
        backend: As for the kernel; None for the one that a run would use.
        options: Further options that the reference has too: `gate`, `normalize`, `eps`.

    Returns:
        One sentence for each tensor that differs; empty when all agree.
    """
    like = torch.empty(0, device=device, dtype=dtype)
    facts = {"qk_dim": qk_dim, "v_dim": v_dim, "chunk_size": chunk_size}
    compiled = select_backend("mlstm_chunkwise", backend, like, **facts) == "triton"
    if not compiled:
        rows, heads, length = 1, 1, None
    length = length or 3 * (chunk_size or 64) // 2
    drawn = min(2, rows * heads)
    inputs = mlstm_inputs(drawn, length, qk_dim, v_dim, gate_soft_cap)
    for name in "qkv":
        inputs[name] = inputs[name].to(dtype).float()
    if carried:
        generator = torch.Generator().manual_seed(2)
        inputs["state C"] = torch.randn(drawn, qk_dim, v_dim, generator=generator)
        inputs["state n"] = torch.rand(drawn, qk_dim, generator=generator)
    place = (torch.arange(rows)[:, None] + torch.arange(heads)) % drawn
    starts = three_documents(length)
    starts[:, 0] = not carried  # the first document of the row goes on, or begins

    def kernel(*tensors: Tensor, **more: bool) -> Any:
        q, k, v, *gates, C, n = (x[place.to(x.device)] for x in _with_state(tensors))
        q, k, v = (_laid_out(x.to(dtype), "bhsd", order.replace("g", "") + "d") for x in (q, k, v))
        gates = _laid_out(torch.stack(gates), "gbhs", order).unbind(0)
        return mlstm_chunkwise(
            *(q, k, v, *gates),
            (C, n, n.new_zeros(n.shape[:2])) if carried else None,
            boundaries=starts.repeat(rows, 1).to(device),
            chunk_size=chunk_size,
            gate_soft_cap=gate_soft_cap,
            states_dtype=states_dtype,
            backend=backend,
            **options,
            **more,
        )

    def recurrence(*tensors: Tensor) -> tuple[Tensor, State]:
        q, k, v, *gates, C, n = (x[None] for x in _with_state(tensors))
        gates = [soft_cap(gate, gate_soft_cap, q) for gate in gates]
        state = (C, n, n.new_zeros(n.shape[:2])) if carried else None
        given = {"boundaries": starts.to(q.device), **REFERENCE_OPTIONS, **options}
        if compiled:
            large = {"chunk_size": REFERENCE_CHUNK, "return_last_state": True}
            h, last = mlstm_chunkwise_torch(q, k, v, *gates, state, **large, **given)
        else:
            h, last = mlstm_recurrence(q, k, v, *gates, state, **given)
        everywhere = place.to(h.device)
        return h[0][everywhere], tuple(x[0][everywhere] for x in last)

    def kernel_state(*tensors: Tensor) -> Tensor:
        return _side_by_side(kernel(*tensors, return_last_state=True)[1])

    rest = device, dtype
    more = {
        "where": device if compiled else "cpu",
        "limit": LIMITS[torch.bfloat16 if states_dtype == torch.bfloat16 else dtype],
    }
    problems = compare(
        "mlstm_chunkwise", kernel, lambda *x: recurrence(*x)[0], inputs, *rest, **more
    )
    # A kernel of its own, which a look into the cells or a prompt takes.
    return problems + compare(
        "mlstm_chunkwise",
        kernel_state,
        lambda *x: _side_by_side(recurrence(*x)[1]),
        inputs,
        *rest,
        "last state",
        gradients=False,
        **more,
    )


def _side_by_side(state: State) -> Tensor:
    """C and n of a state as one tensor: their sums are about as large."""
    C, n, _ = state
    return torch.cat((C, n[..., None]), dim=-1)


# On a GPU. States of short chunks in fp64 would fill it: those of two heads of 1,024 take 34 GB for
# each tensor of them at 131,072 tokens and chunks of 64.
REFERENCE_CHUNK = 512

REFERENCE_OPTIONS = {"gate": "exp", "normalize": True, "eps": 1e-6}  # as `mlstm_chunkwise` has them


def _with_state(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs of the mLSTM and a state; an empty one where there is none."""
    none = tensors[0].new_empty(len(tensors[0]), 0)
    return tensors if len(tensors) > 5 else (*tensors, none, none)


def _laid_out(x: Tensor, axes: str, order: str) -> Tensor:
    """`x`, whose axes have these names, in memory that has them in another order."""
    there, back = [axes.index(a) for a in order], [order.index(a) for a in axes]
    return x.permute(there).contiguous().permute(back)


def three_documents(length: int) -> Tensor:
    """Boundaries `[1, length]` of a row with the documents of `mlstm_inputs`."""
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[:, [0, length // 6, length // 3]] = True
    return starts


def mlstm_inputs(
    sequences: int, length: int, qk_dim: int, v_dim: int, cap: float | None
) -> dict[str, Tensor]:
    """q, k, v `[sequences, length, d]` and gates `[sequences, length]` for `three_documents`.

    What a token writes lasts for a third of the row, so a state that is lost on the way shows. n.q
    is far from zero, where the result has no digits, and from the bound of the normalizer, where
    rounding would decide about a gradient. The input gates of the second document are almost shut:
    n.q lies below the bound there, and above it elsewhere.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(sequences, length, *shape, generator=generator)

    q, k, v = draw(qk_dim) + 1, draw(qk_dim) + 1, draw(v_dim)
    igate, fgate = draw(), draw() + math.log(length / 2)
    shut = slice(length // 6, length // 3)
    low = -math.log(length * qk_dim**0.5)
    igate[:, shut] += low if cap is None else cap * math.atanh(max(low / cap, -0.99))
    v[:, shut] *= 8  # what is left of it is as large as elsewhere
    return {"q": q, "k": k, "v": v, "input gate": igate, "forget gate": fgate}


def check_slstm(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    head_dim: int = 64,
    rows: int = 1,
    heads: int = 2,
    backend: str | None = None,
    **gates: str,
) -> list[str]:
    """What is wrong with `slstm_scan` on a device; as `check_mlstm`.

    Large heads are replayed as graphs of the GPU, of more steps than the comparison has: these are
    compared with single launches.

    Args:
        device: Where the kernel runs.
        dtype: Of gate pre-activations, recurrent weight and bias.
        head_dim: Width of a head.
        rows: Of the batch, on Triton; 1 elsewhere.
        heads: Number of heads, on Triton; 1 elsewhere.
        backend: As for the kernel; None for the one that a run would use.
        gates: `forget_gate` and `input_gate`, as for the kernel.
    """
    like = torch.empty(0, device=device, dtype=dtype)
    facts = {"d": head_dim, "cell": cell_of(gates.get("input_gate", "exp"))}
    chosen = select_backend("slstm_scan", backend, like, batch=rows, heads=heads, **facts)
    if chosen not in ("triton", "persistent"):
        rows, heads = 1, 1

    def kernel(*tensors: Tensor, starts: Tensor) -> Tensor:
        return slstm_scan(*tensors, boundaries=starts, backend=backend, **gates)

    def reference(*tensors: Tensor, starts: Tensor) -> Tensor:
        return slstm_recurrence(*tensors, boundaries=starts, **gates)[0]

    size = rows, heads, head_dim
    problems = _compare_scans("slstm_scan", kernel, reference, device, dtype, size)
    if chosen == "triton":
        from xlstm_kernels.slstm.triton.graph_check import check_graphs

        problems += check_graphs(like, head_dim, heads, gates.get("forget_gate", "sigmoid"), rows)
    return problems


def check_lstm(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    head_dim: int = 64,
    backend: str | None = None,
) -> list[str]:
    """What is wrong with `lstm_scan`, which has no Triton kernel, on a device; as `check_slstm`."""

    def kernel(*tensors: Tensor, starts: Tensor) -> Tensor:
        return lstm_scan(*tensors, boundaries=starts, backend=backend)

    def reference(*tensors: Tensor, starts: Tensor) -> Tensor:
        return lstm_recurrence(*tensors, boundaries=starts)[0]

    return _compare_scans("lstm_scan", kernel, reference, device, dtype, (1, 1, head_dim))


def _compare_scans(
    name: str,
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
    size: tuple[int, int, int],
) -> list[str]:
    """As `compare`, of a scan over a batch with this size (rows, heads, head_dim)."""
    (rows, heads, head_dim), length = size, 24
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "gates": draw(rows, length, 4, heads, head_dim),
        "recurrent weight": draw(4, heads, head_dim, head_dim) / head_dim**0.5,
        "bias": draw(4, heads, head_dim),
    }
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    starts = two_documents(length).repeat(rows, 1)
    on_device = partial(kernel, starts=starts.to(device))
    return compare(name, on_device, partial(reference, starts=starts), inputs, device, dtype)


def two_documents(length: int) -> Tensor:
    """Boundaries `[1, length]` of a row with two documents."""
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[:, [0, length // 3]] = True
    return starts


def shaped(device: torch.device | str, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor of any shape, in the memory of one number: a backend is chosen by it."""
    return torch.empty(1, device=device, dtype=dtype).expand(shape)


def compare(
    name: str,
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
    result: str = "hidden states",
    where: torch.device | str = "cpu",
    limit: float | None = None,
    gradients: bool = True,
) -> list[str]:
    """One sentence for each tensor in which the kernel and the reference differ.

    `where` is the device of the reference, and `limit` that of `LIMITS` unless it is given. Without
    `gradients` the result alone is compared.
    """
    upstream, limit = None, limit or LIMITS[dtype]
    found: list[list[Tensor]] = []
    for function, place, kind in ((reference, where, torch.float64), (kernel, device, None)):
        given = [
            x.detach().to(place, kind or x.dtype).requires_grad_(gradients) for x in inputs.values()
        ]
        h = function(*given)
        if not gradients:
            found.append([h.to(where).double()])
            continue
        if upstream is None:
            generator = torch.Generator().manual_seed(1)
            upstream = torch.randn(h.shape, generator=generator).to(dtype)
        grads = torch.autograd.grad(h, given, upstream.to(h.device, h.dtype))
        found.append([one.detach().to(where).double() for one in (h, *grads)])
    names = [result, *(f"gradient of {one}" for one in inputs if gradients)]
    problems = []
    for what, expected, got in zip(names, *found, strict=True):
        off, norm = got - expected, torch.linalg.vector_norm
        error = max((norm(off, p) / norm(expected, p)).item() for p in (torch.inf, 2))
        if not error <= limit:  # nan is worse than any number
            problems.append(
                f"{name} on {device} in {str(dtype).removeprefix('torch.')}, {what}: off by "
                f"{error:.1e} of the fp64 reference (at most {limit:.0e})"
            )
    return problems
