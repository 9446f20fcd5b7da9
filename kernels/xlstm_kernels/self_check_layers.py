"""Do the kernels around the cells compute what they should on this device?

A comparison as in `self_check`. On a CPU the backend depends on how large a call is. `tokens` of a
check is how many a call of the run has: the backend is chosen for so many, and then asked for with
fewer rows.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.conv.conv import causal_conv1d, conv_backend
from xlstm_kernels.cross_entropy import softmax_gradient, softmax_statistics
from xlstm_kernels.cross_entropy.cross_entropy import cross_entropy_backend
from xlstm_kernels.gated.gated import gated_activation, gated_backend
from xlstm_kernels.norm.norm import add_norm, multihead_norm, norm_backend, norm_beside
from xlstm_kernels.norm.skip import norm_gated_skip
from xlstm_kernels.qkv.convolved import conv_qkv_and_gates
from xlstm_kernels.qkv.qkv import qkv_and_gates, qkv_backend
from xlstm_kernels.self_check import compare, shaped, two_documents
from xlstm_kernels.self_check_again import (
    compare_again,
    gated_again,
    norm_again,
    norm_skip_again,
)
from xlstm_kernels.self_check_equations import normalised, silu_of_conv

ROWS = 8  # of a comparison; the loops of classic blocks take them by fours
CONV_ROWS = 100  # on Triton: three tiles and a part
TURNS = 3  # of each program of a backward pass on Triton, and a part


def check_conv(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    channels: int,
    width: int,
    tokens: int = ROWS,
    carried: bool = False,
    backend: str | None = None,
) -> list[str]:
    """What is wrong with `causal_conv1d`, with SiLU, on a device; as `check_mlstm` does.

    Args:
        device: Where the kernel runs.
        dtype: Of input, weight and bias.
        channels: Their number.
        width: Taps.
        tokens: Of a call in a run.
        carried: Whether there are inputs before the first, as on a rank of context parallelism.
        backend: As for the kernel; None for the one that a run would use.
    """
    state = _draw(channels, width - 1)[None] if carried else None
    chosen = conv_backend(shaped(device, dtype, 1, tokens, channels), state, backend)
    count = CONV_ROWS if chosen == "triton" else ROWS
    starts = two_documents(count)
    starts[:, 0] = not carried  # the first document of the row goes on, or begins

    def kernel(x: Tensor, weight: Tensor, bias: Tensor, *before: Tensor) -> Tensor:
        return causal_conv1d(
            x[None],
            weight,
            bias,
            before[0].t()[None] if before else None,
            activation="silu",
            boundaries=starts.to(device),
            backend=chosen,
        )[0]

    def reference(x: Tensor, weight: Tensor, bias: Tensor, *before: Tensor) -> Tensor:
        return silu_of_conv(x, weight, bias, starts, *before)

    inputs = {
        "input": _draw(channels, count),
        "weight": _draw(channels, width).t(),
        "bias": _draw(channels)[0],
    }
    if carried:
        inputs["inputs before"] = _draw(channels, width - 1).flip(0)
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    return compare("causal_conv1d", kernel, reference, inputs, device, dtype, "result")


def check_gated_activation(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    width: int,
    activation: str,
    tokens: int = ROWS,
    backend: str | None = None,
) -> list[str]:
    """What is wrong with `gated_activation` on a device; as `check_conv`.

    Args:
        device: Where the kernel runs.
        dtype: Of the packed projection.
        width: Width of each half.
        activation: As for the kernel.
        tokens: Of a call in a run.
        backend: As for the kernel; None for the one that a run would use.
    """
    chosen = gated_backend(shaped(device, dtype, tokens, 2 * width), activation, backend)
    kernel = partial(gated_activation, activation=activation, backend=chosen)

    def reference(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate)) * up

    inputs = {"gate and up": _draw(2 * width).to(dtype)}
    problems = compare("gated_activation", kernel, reference, inputs, device, dtype, "result")
    if chosen == "triton":
        of = kernel, gated_again(activation), reference, inputs, device, dtype
        problems += compare_again("gated_activation_again", *of)
    return problems


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
    beside: bool = False,
    tokens: int = ROWS,
    backend: str | None = None,
) -> list[str]:
    """What is wrong with `multihead_norm`, `add_norm` or `norm_beside`; as `check_conv`.

    Args:
        device: Where the kernel runs.
        dtype: Of input, weight and gate.
        width: Of a head. The norm of a block has one head as wide as the model.
        kind: As for the kernel.
        eps: As for the kernel.
        heads: Number of heads.
        gated: Whether there is an output gate.
        summed: Whether it is `add_norm` of one head, whose sum is compared as well.
        beside: Whether it is `norm_beside` of one head, with the input that goes on.
        tokens: Of a call in a run.
        backend: "torch", or None for the one that a run would use.
    """
    own = "torch" if backend == "torch" else None
    chosen = norm_backend(shaped(device, dtype, tokens, heads, width), own)
    draw = partial(_draw, heads * width, _rows(chosen, tokens, heads, width))

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, width))

    def kernel(x: Tensor, weight: Tensor, *gate: Tensor) -> Tensor:
        if summed:
            return torch.cat(add_norm(x, gate[0], weight, kind, eps, backend=chosen), dim=-1)
        if beside:
            return torch.cat(norm_beside(x, weight, kind, eps, backend=chosen), dim=-1)
        opened = by_head(gate[0]) if gate else None
        y = multihead_norm(by_head(x), weight, kind, eps, gate=opened, backend=chosen)
        return y.flatten(-2)

    def reference(x: Tensor, weight: Tensor, *gate: Tensor) -> Tensor:
        x = by_head(x + gate[0] if summed else x)
        y = normalised(x, kind, eps).flatten(-2) * weight
        if summed or beside:
            return torch.cat((x.flatten(-2), y), dim=-1)
        return y * gate[0].sigmoid() if gate else y

    inputs = {"input": draw(), "weight": draw()[0]}
    inputs |= {"gate" if gated else "added": draw().flip(0)} if gated or summed else {}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    name = "add_norm" if summed else "norm_beside" if beside else "multihead_norm"
    problems = compare(name, kernel, reference, inputs, device, dtype, "result")
    if chosen == "triton" and gated:
        of = kernel, norm_again(heads, width, kind, eps), reference, inputs, device, dtype
        problems += compare_again("multihead_norm_again", *of)
    return problems


def check_qkv_and_gates(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    inner: int,
    heads: int,
    block: int,
    gates: int,
    width: int = 0,
    carried: bool = False,
    tokens: int = ROWS,
    backend: str | None = None,
) -> list[str]:
    """What is wrong with `qkv_and_gates`, its results side by side; as `check_conv`.

    With `width` it is `conv_qkv_and_gates`.

    Args:
        device: Where the kernel runs.
        dtype: Of inputs and weights.
        inner: Columns of the inputs.
        heads: Number of heads.
        block: Width of a block.
        gates: Number of gates, those of heads on other ranks too.
        width: Taps of the convolution, or 0 without one.
        carried: As for `check_conv`.
        tokens: Of a call in a run.
        backend: "torch", or None for the one that a run would use.
    """
    own = "torch" if backend == "torch" else None
    chosen = qkv_backend(shaped(device, dtype, 1, tokens, inner), block, heads, own)
    count = _rows(chosen, tokens, heads, inner // heads)
    draw = partial(_draw, inner, count)
    starts = two_documents(count)
    starts[:, 0] = not carried

    def joined(q: Tensor, k: Tensor, v: Tensor, preacts: Tensor) -> Tensor:
        by_token = (one.transpose(1, 2).flatten(2) for one in (q, k, v))
        return torch.cat((*by_token, preacts.to(q.dtype)), dim=-1)

    def kernel(
        convolved: Tensor, x: Tensor, blocks: Tensor, gate_weight: Tensor, *conv: Tensor
    ) -> Tensor:
        if not conv:
            inputs = convolved[None], x[None], blocks, gate_weight
            return joined(*qkv_and_gates(*inputs, heads, backend=chosen))
        taps, bias, *before = conv
        of_input, beside, *results = conv_qkv_and_gates(
            torch.cat((x, convolved), dim=-1)[None],
            taps,
            bias,
            blocks,
            gate_weight,
            heads,
            before[0].t()[None] if before else None,
            boundaries=starts.to(device),
            backend=chosen,
        )
        return torch.cat((of_input, beside, joined(*results)), dim=-1)

    def reference(
        convolved: Tensor, x: Tensor, blocks: Tensor, gate_weight: Tensor, *conv: Tensor
    ) -> Tensor:
        lead = []
        if conv:
            taps, bias, *before = conv
            beside, convolved = convolved, silu_of_conv(x, taps, bias, starts, *before)
            lead = [convolved, beside]
        q, k, v = (
            torch.einsum("tbi,boi->tbo", source.unflatten(-1, (-1, block)), weight).flatten(1)
            for source, weight in zip((convolved, convolved, x), blocks.chunk(3), strict=True)
        )
        qkv = torch.cat((q, k, v), dim=-1)
        return torch.cat((*lead, qkv, qkv @ gate_weight.t()), dim=-1)[None]

    inputs = {"convolved input": draw(), "input": draw().flip(0)}
    inputs["blocks"] = _draw(block * block, 3 * inner // block).view(-1, block, block)
    inputs["gate weight"] = _draw(3 * inner, gates) / inner**0.5
    if width:
        inputs |= {"taps": _draw(inner, width).t(), "bias": _draw(inner)[0]}
    if width and carried:
        inputs["inputs before"] = _draw(inner, width - 1).flip(0)
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    name = "conv_qkv_and_gates" if width else "qkv_and_gates"
    return compare(name, kernel, reference, inputs, device, dtype, "result")


def check_norm_gated_skip(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    heads: int,
    width: int,
    kind: str,
    eps: float,
    tokens: int = ROWS,
    backend: str | None = None,
) -> list[str]:
    """What is wrong with `norm_gated_skip` on a device; as `check_conv`.

    Args:
        device: Where the kernel runs.
        dtype: Of inputs and weights.
        heads: Number of heads.
        width: Of a head.
        kind: As for the kernel.
        eps: As for the kernel.
        tokens: Of a call in a run.
        backend: "torch", or None for the one that a run would use.
    """
    own = "torch" if backend == "torch" else None
    chosen = norm_backend(shaped(device, dtype, tokens, heads, width), own)
    draw = partial(_draw, heads * width, _rows(chosen, tokens, heads, width))

    def kernel(h: Tensor, weight: Tensor, skip: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        by_head = h.unflatten(1, (heads, width)).transpose(0, 1)[None]
        return norm_gated_skip(
            by_head, weight, kind, eps, skip, x[:, None], gate[:, None], backend=chosen
        )[:, 0]

    def reference(h: Tensor, weight: Tensor, skip: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        normed = normalised(h.unflatten(1, (heads, width)), kind, eps).flatten(1) * weight
        return (normed + skip * x) * gate * gate.sigmoid()

    inputs = {"hidden states": draw(), "weight": draw()[0], "skip": draw()[1]}
    inputs |= {"input": draw().flip(0), "gate": draw().flip(1)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    problems = compare("norm_gated_skip", kernel, reference, inputs, device, dtype, "result")
    if chosen == "triton":
        of = kernel, norm_skip_again(heads, kind, eps), reference, inputs, device, dtype
        problems += compare_again("norm_gated_skip_again", *of)
    return problems


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
    tokens: int = ROWS,
    backend: str | None = None,
) -> list[str]:
    """What is wrong with `softmax_statistics` and `softmax_gradient`; as `check_conv`.

    Args:
        device: Where the kernels run.
        dtype: Of the logits.
        width: Of the vocabulary.
        soft_cap: As for the kernels.
        tokens: Of a call in a run.
        backend: As for the kernels; None for the one that a run would use.
    """
    logits = (8 * _draw(width)).to(dtype)
    labels = torch.arange(len(logits)) * 12345 % width
    chosen = cross_entropy_backend(shaped(device, dtype, tokens, width), backend)

    def kernel(x: Tensor) -> Tensor:
        return _Loss.apply(x, labels.to(device), soft_cap, chosen)

    def reference(x: Tensor) -> Tensor:
        y = x if soft_cap is None else soft_cap * torch.tanh(x / soft_cap)
        return F.cross_entropy(y, labels, reduction="none")

    inputs = {"logits": logits}
    return compare("cross_entropy", kernel, reference, inputs, device, dtype, "losses")


def _rows(chosen: str, tokens: int, heads: int, width: int) -> int:
    """Rows of a comparison: few, but on Triton so many that programs have several turns backward.

    Args:
        chosen: The backend.
        tokens: Of a call in a run, which has no more rows.
        heads: Number of heads.
        width: Of a head.
    """
    if chosen != "triton":
        return ROWS
    from xlstm_kernels.norm.triton import ELEMENTS, PROGRAMS

    # Of all kernels that share out rows, the norm has the most rows in a turn.
    return min(tokens, TURNS * PROGRAMS // heads * max(ELEMENTS // width, 1) + ROWS // 2)


def _draw(width: int, rows: int = ROWS) -> Tensor:
    """Some rows of random numbers, the same in every run."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
