"""How mixers call the kernels: for a whole sequence, or for one token after a prompt.

With a cache, the layer continues from the state that the cache holds. A call with several tokens
(the prompt, or a part of it) runs the chunkwise kernels from that state. A call with one token runs
the step kernels, which update the state in place.

Without a cache, the layer continues from what the context-parallel ranks before this one hold, if
there are any.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xlstm_kernels import (
    causal_conv1d,
    gated_skip,
    lstm_scan,
    lstm_step,
    mlstm_chunkwise,
    mlstm_step,
    multihead_norm,
    norm_gated_skip,
    slstm_scan,
    slstm_step,
)
from xlstm_kernels.norm.norm import norm_backend
from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.mixers.observation import Observer, of_mlstm, of_slstm
from xlstm_mcore.modules.soft_cap import soft_cap
from xlstm_mcore.parallel.context import ContextParallel
from xlstm_mcore.parallel.mlstm_state import entering_state
from xlstm_mcore.recompute import rerun_cell

# `memory.cell_states` -> what the kernels are asked for.
STATES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}


def run_mlstm(
    config: XLSTMConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    boundaries: Tensor | None,
    cache: dict | None,
    context: ContextParallel,
    gate_soft_cap: float | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """The mLSTM cell over this rank's `s` tokens.

    Args:
        config: The gates, eps, chunk size, type of kept states and backend are read.
        q: `[b, heads, s, qk_dim]`.
        k: `[b, heads, s, qk_dim]`.
        v: `[b, heads, s, v_dim]`.
        igate: Pre-activations `[b, heads, s]` of the input gate.
        fgate: Pre-activations `[b, heads, s]` of the forget gate.
        boundaries: Bool `[b, s * cp]` of the whole row, True at the first token of a document, or
            None.
        cache: The layer's state between calls, or None; key "mlstm" is read and updated.
        context: Where this rank's tokens lie in the row.
        gate_soft_cap: Cap of the pre-activations, or None. The kernels apply it, unless the capped
            gates are needed here too.
        observe: Called with what the cell did, or None.

    Returns:
        Hidden states `[b, heads, s, v_dim]`.
    """
    learned = config.mlstm_input_gate and config.mlstm_forget_gate
    if not learned or context.group.size() > 1:
        igate, fgate = soft_cap(igate, gate_soft_cap), soft_cap(fgate, gate_soft_cap)
        gate_soft_cap = None
    igate, fgate = _apply_gate_ablations(config, igate, fgate)
    options = {
        "gate": config.mlstm_gate,
        "normalize": config.mlstm_normalize,
        "eps": config.cell_eps,
        "gate_soft_cap": gate_soft_cap,
    }
    inputs = q, k, v, igate, fgate
    return _matrix_memory(config, inputs, boundaries, cache, context, options, observe)


def run_mamba2(
    config: XLSTMConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fgate: Tensor,
    boundaries: Tensor | None,
    cache: dict | None,
    context: ContextParallel,
) -> Tensor:
    """The recurrence of Mamba-2 over this rank's `s` tokens: `C = decay C + k v^T`, `h = q C`.

    It is the mLSTM with a sigmoid input gate that is held open, and without the normaliser.
    Arguments and result are those of `run_mlstm`; `decay = sigmoid(fgate)`.
    """
    igate = torch.full_like(fgate, 60.0)  # its sigmoid is 1 to the last bit in fp64
    options = {"gate": "sigmoid", "normalize": False}
    return _matrix_memory(config, (q, k, v, igate, fgate), boundaries, cache, context, options)


def _matrix_memory(
    config: XLSTMConfig,
    inputs: tuple[Tensor, ...],
    boundaries: Tensor | None,
    cache: dict | None,
    context: ContextParallel,
    options: dict[str, Any],
    observe: Observer | None = None,
) -> Tensor:
    """The mLSTM's kernels over `inputs` (q, k, v and the gates), by chunks or for one token."""
    q, k, v, igate, fgate = inputs
    options = options | {"backend": config.kernel_backend}
    boundaries = context.local_slice(boundaries)
    if cache is None:
        gates = igate, fgate, boundaries
        state = entering_state(k, v, *gates, context.group, gate=options["gate"])
    else:
        state = cache.get("mlstm")
    if state is not None and k.shape[2] == 1 and _may_step(boundaries):
        token = (t.squeeze(2) for t in inputs)
        return mlstm_step(*token, state, **options).unsqueeze(2)
    call = partial(
        mlstm_chunkwise,
        chunk_size=config.chunk_size,
        boundaries=boundaries,
        states_dtype=STATES[config.cell_states],
        **options,
    )
    if cache is None and observe is None:
        return rerun_cell(lambda *x: call(*x[:5], x[5:] or None), *inputs, *(state or ()))
    h, state = call(*inputs, state, return_last_state=True)
    if cache is not None:
        cache["mlstm"] = state
    if observe is not None:
        capped = (soft_cap(gate, options["gate_soft_cap"]) for gate in (igate, fgate))
        last = context.rank == context.size - 1
        observe(of_mlstm(*capped, q, state, row_ends=last, normalize=options["normalize"]))
    return h


def gate_weight(config: XLSTMConfig, weight: Tensor) -> Tensor:
    """The weight of both gates, with zeros where the forget gate has its bias alone.

    The product with 0 gives the parameter a gradient, which is zero: data-parallel wrappers that
    reduce gradients as they come wait for every one.

    Args:
        config: `mlstm_forget_gate` is read.
        weight: Rows of the input gate, then as many of the forget gate.
    """
    if config.mlstm_forget_gate != "bias":
        return weight
    igate, fgate = weight.chunk(2)
    return torch.cat((igate, 0.0 * fgate))


def _apply_gate_ablations(
    config: XLSTMConfig, igate: Tensor, fgate: Tensor
) -> tuple[Tensor, Tensor]:
    """The pre-activations, with those of a gate that an ablation removes set so that the gate is 1.

    For a sigmoid gate that is 60, whose sigmoid is 1 to the last bit in fp64. The learned gate is
    added with factor 0, so that its parameters have a gradient, which is zero: data-parallel
    wrappers that reduce gradients as they come wait for every one.
    """
    if not config.mlstm_input_gate:
        igate = 0.0 * igate + (0.0 if config.mlstm_gate == "exp" else 60.0)
    if not config.mlstm_forget_gate:
        fgate = 0.0 * fgate + 60.0
    return igate, fgate


def run_slstm(
    config: XLSTMConfig,
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    boundaries: Tensor | None,
    cache: dict | None,
    observe: Observer | None = None,
) -> Tensor:
    """The sLSTM cell over `s` tokens of the whole row.

    Args:
        config: The gates, the form and the backend are read.
        gate_preacts: `[b, s, 4, heads, d]` in the order i, f, z, o.
        recurrent_weight: `[4, heads, d, d]`.
        bias: `[4, heads, d]`.
        boundaries: Bool `[b, s]`, True at the first token of a document, or None.
        cache: The layer's state between calls, or None; key "slstm" is read and updated.
        observe: Called with what the cell did, or None.

    Returns:
        Hidden states `[b, s, heads, d]`.
    """
    tensors = gate_preacts, recurrent_weight, bias
    options: dict[str, Any] = {
        "forget_gate": config.slstm_forget_gate,
        "input_gate": config.slstm_input_gate,
        "backend": config.kernel_backend,
    }
    step = partial(slstm_step, **options)
    if cache is None and config.slstm_form == "persistent":  # generation has rows of its own number
        options["backend"] = "persistent"
    h, state = _recurrence(
        "slstm", partial(slstm_scan, **options), step, tensors, boundaries, cache
    )
    if observe is not None and state is not None:
        observe(of_slstm(*tensors, h, state, boundaries))
    return h


def run_lstm(
    config: XLSTMConfig,
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    boundaries: Tensor | None,
    cache: dict | None,
    observe: Observer | None = None,
) -> Tensor:
    """The LSTM over `s` tokens of the whole row; arguments and result are those of `run_slstm`.

    Its gates and state are not observed: `observe` is not called.
    """
    tensors = gate_preacts, recurrent_weight, bias
    scan = partial(lstm_scan, backend=config.kernel_backend)
    return _recurrence("lstm", scan, lstm_step, tensors, boundaries, cache)[0]


def _recurrence(
    key: str,
    scan: Callable[..., tuple[Tensor, tuple[Tensor, ...]]],
    step: Callable[..., Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    boundaries: Tensor | None,
    cache: dict | None,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Hidden states of a cell that goes token by token, and a scan's last state.

    `tensors` are pre-activations, recurrent weight and bias; the cache has the state under `key`.
    """
    gate_preacts, *weights = tensors
    state = None if cache is None else cache.get(key)
    if state is not None and gate_preacts.shape[1] == 1 and _may_step(boundaries):
        return step(gate_preacts.squeeze(1), *weights, state).unsqueeze(1), None
    h, state = scan(*tensors, state, return_last_state=True, boundaries=boundaries)
    if cache is not None:
        cache[key] = state
    return h, state


def run_conv(
    config: XLSTMConfig,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    boundaries: Tensor | None,
    cache: dict | None,
    context: ContextParallel | None = None,
) -> Tensor:
    """Causal convolution and SiLU of `x [b, s, c]`, same shape.

    Args:
        config: The backend is read.
        x: The input.
        weight: `[c, width]`, or None in a model without convolutions; then `x` is returned.
        bias: `[c]`, or None like the weight.
        boundaries: Bool, of the whole row, True at the first token of a document, or None.
        cache: The layer's state between calls, or None; key "conv" is read and updated.
        context: Where this rank's slice of the row lies. None if `x` is the whole row, as after an
            all-to-all to heads.
    """
    if weight is None:
        return x
    before = None if cache is None else cache.get("conv")
    if context is not None:
        if cache is None:
            before = context.tokens_before(x, weight.shape[1] - 1, boundaries)
        boundaries = context.local_slice(boundaries)
    y = causal_conv1d(
        x,
        weight,
        bias,
        before,
        activation="silu",
        boundaries=boundaries,
        return_last_state=cache is not None,
        backend=config.kernel_backend,
    )
    if cache is not None:
        y, cache["conv"] = y
    return y


def own_backend(config: XLSTMConfig) -> str | None:
    """The backend beside cells and norms: PyTorch where it is asked for, else the best one."""
    return "torch" if config.kernel_backend == "torch" else None


def run_head_norm(
    config: XLSTMConfig,
    h: Tensor,
    weight: Tensor,
    ogate: Tensor | None = None,
    layout: str = "heads last",
) -> Tensor:
    """Norm of each head of `h`, times `sigmoid(ogate)` if there is one.

    Args:
        config: The kind of norm ("none" multiplies by the weight alone), eps and backend are read.
        h: Hidden states `[..., heads, d]`; by head: `[b, heads, s, d]`.
        weight: `[heads * d]`.
        ogate: Pre-activations of the output gate, in the shape of `h`, or None.
        layout: "heads last", or "by head" for a result `[s * b, heads * d]`, see `multihead_norm`.
    """
    if config.head_norm == "none":
        by_head = layout == "by head"
        shape = (h.shape[1], 1, h.shape[3]) if by_head else h.shape[-2:]
        h = h * weight.view(shape)
        h = h if ogate is None else torch.sigmoid(ogate) * h
        return h.permute(2, 0, 1, 3).flatten(2).flatten(0, 1) if by_head else h
    return multihead_norm(
        h,
        weight,
        config.head_norm,
        config.norm_eps,
        gate=ogate,
        layout=layout,
        backend=config.kernel_backend,
    )


def run_norm_gated_skip(
    config: XLSTMConfig, h: Tensor, weight: Tensor, skip: Tensor, x: Tensor, gate: Tensor
) -> Tensor:
    """`(norm(h) + skip * x) * silu(gate)`, `[s, b, heads * d]`; see `norm_gated_skip`.

    Args:
        config: The kind of norm ("none" multiplies by the weight alone), eps and backend are read.
        h: Hidden states `[b, heads, s, d]`.
        weight: `[heads * d]`.
        skip: `[heads * d]`.
        x: `[s, b, heads * d]`.
        gate: `[s, b, heads * d]`.
    """
    if config.head_norm == "none":
        h = run_head_norm(config, h, weight, layout="by head").view(x.shape)
        return gated_skip(h, skip, x, gate, backend=own_backend(config))
    return norm_gated_skip(
        h, weight, config.head_norm, config.norm_eps, skip, x, gate, backend=config.kernel_backend
    )


def head_norm_backend(config: XLSTMConfig, h: Tensor) -> str:
    """The backend of `run_head_norm` of `h [..., d]`, and on Triton of `run_norm_gated_skip`.

    All but PyTorch are one kernel that keeps its inputs alone.
    """
    return "torch" if config.head_norm == "none" else norm_backend(h, config.kernel_backend)


def _may_step(boundaries: Tensor | None) -> bool:
    """Whether the step kernels may run: they do not take boundaries and record no gradient."""
    return boundaries is None and not torch.is_grad_enabled()
