"""How a layer calls its cells: a whole sequence, or one token after a prompt.

With a cache a layer's past is its state. A call of several tokens (the prompt, or a part of it)
continues from the state with the chunkwise kernels; a call of one token goes through the step
kernels, which update the state in place.

Without one the past is what the context-parallel ranks before this one hold, if there are any.
"""

from typing import Any

import torch
from torch import Tensor

from xlstm_kernels import (
    causal_conv1d,
    mlstm_chunkwise,
    mlstm_step,
    multihead_norm,
    slstm_scan,
    slstm_step,
)
from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.modules.linear import soft_cap
from xlstm_mcore.parallel.context import ContextParallel
from xlstm_mcore.parallel.mlstm_state import entering_state


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
) -> Tensor:
    """The mLSTM cell over this rank's `s` tokens.

    Args:
        config: eps, chunk size and backend are read.
        q, k: `[b, heads, s, qk_dim]`; v `[b, heads, s, v_dim]`.
        igate, fgate: pre-activations `[b, heads, s]`.
        boundaries: bool `[b, s * cp]` of the whole row, True at the first token of a document, or
            None.
        cache: the layer's state between calls; key "mlstm" is read and updated.
        context: where this rank's tokens lie.
        gate_soft_cap: of the gates; the kernels apply it, unless the gates are needed here too.

    Returns:
        Hidden states `[b, heads, s, v_dim]`.
    """
    learned = config.mlstm_input_gate and config.mlstm_forget_gate
    if not learned or context.group.size() > 1:
        igate, fgate = soft_cap(igate, gate_soft_cap), soft_cap(fgate, gate_soft_cap)
        gate_soft_cap = None
    igate, fgate = _held_open(config, igate, fgate)
    boundaries = context.own(boundaries)
    if cache is None:
        gates = igate, fgate, boundaries
        state = entering_state(k, v, *gates, context.group, gate=config.mlstm_gate)
    else:
        state = cache.get("mlstm")
    if state is not None and q.shape[2] == 1 and _may_step(boundaries):
        token = (t.squeeze(2) for t in (q, k, v, igate, fgate))
        h = mlstm_step(*token, state, gate_soft_cap=gate_soft_cap, **_mlstm_options(config))
        return h.unsqueeze(2)
    h = mlstm_chunkwise(
        q,
        k,
        v,
        igate,
        fgate,
        state,
        chunk_size=config.chunk_size,
        return_last_state=cache is not None,
        boundaries=boundaries,
        gate_soft_cap=gate_soft_cap,
        **_mlstm_options(config),
    )
    if cache is not None:
        h, cache["mlstm"] = h
    return h


def _mlstm_options(config: XLSTMConfig) -> dict[str, Any]:
    return {
        "gate": config.mlstm_gate,
        "normalize": config.mlstm_normalize,
        "eps": config.cell_eps,
        "backend": config.kernel_backend,
    }


def _held_open(config: XLSTMConfig, igate: Tensor, fgate: Tensor) -> tuple[Tensor, Tensor]:
    """The gates' pre-activations, or those of a gate of 1 where an ablation takes it away.

    Where a sigmoid makes the gate, 60 does: in fp64 its sigmoid is 1 to the last bit. Adding 0
    times the gate gives its parameters a gradient, which is zero: data-parallel wrappers that
    reduce gradients as they come wait for every one.
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
) -> Tensor:
    """The sLSTM cell over `s` tokens; shapes as in `slstm_scan`, the cache's key is "slstm"."""
    state = None if cache is None else cache.get("slstm")
    if state is not None and gate_preacts.shape[1] == 1 and _may_step(boundaries):
        token = gate_preacts.squeeze(1)
        h = slstm_step(token, recurrent_weight, bias, state, **_slstm_options(config))
        return h.unsqueeze(1)
    h = slstm_scan(
        gate_preacts,
        recurrent_weight,
        bias,
        state,
        return_last_state=cache is not None,
        boundaries=boundaries,
        **_slstm_options(config),
    )
    if cache is not None:
        h, cache["slstm"] = h
    return h


def _slstm_options(config: XLSTMConfig) -> dict[str, Any]:
    return {"forget_gate": config.slstm_forget_gate, "backend": config.kernel_backend}


def run_conv(
    config: XLSTMConfig,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    boundaries: Tensor | None,
    cache: dict | None,
    context: ContextParallel | None = None,
) -> Tensor:
    """Causal convolution and SiLU of `x [b, s, c]`; the cache's key is "conv".

    Without a weight, in a model without convolutions, x as it is. With `context` x is this rank's
    slice of the row, whose boundaries are given whole; without it x is the whole row, as after an
    all-to-all to heads.
    """
    if weight is None:
        return x
    before = None if cache is None else cache.get("conv")
    if context is not None:
        if cache is None:
            before = context.tokens_before(x, weight.shape[1] - 1, boundaries)
        boundaries = context.own(boundaries)
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


def run_head_norm(
    config: XLSTMConfig, h: Tensor, weight: Tensor, ogate: Tensor | None = None
) -> Tensor:
    """Norm of each head of `h [..., heads, d]`, times `sigmoid(ogate)` of that shape."""
    if config.head_norm == "none":
        h = h * weight.view(h.shape[-2:])
        return h if ogate is None else torch.sigmoid(ogate) * h
    return multihead_norm(
        h, weight, config.head_norm, config.norm_eps, gate=ogate, backend=config.kernel_backend
    )


def _may_step(boundaries: Tensor | None) -> bool:
    """The step kernels know no boundaries and record no gradient."""
    return boundaries is None and not torch.is_grad_enabled()
