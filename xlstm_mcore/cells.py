"""How a layer calls its cells: a whole sequence, or one token after a prompt.

With a cache a layer's past is its state. A call of several tokens (the prompt, or a part of it)
continues from the state with the chunkwise kernels; a call of one token goes through the step
kernels, which update the state in place.
"""

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

from .config import XLSTMConfig


def run_mlstm(
    config: XLSTMConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    boundaries: Tensor | None,
    cache: dict | None,
) -> Tensor:
    """The mLSTM cell over ``s`` tokens.

    Args:
        config: eps, chunk size and backend are read.
        q, k: ``[b, heads, s, qk_dim]``; v ``[b, heads, s, v_dim]``.
        igate, fgate: pre-activations ``[b, heads, s]``, soft-capped where the block does.
        boundaries: bool ``[b, s]``, True at the first token of a document, or None.
        cache: the layer's state between calls; key "mlstm" is read and updated.

    Returns:
        Hidden states ``[b, heads, s, v_dim]``.
    """
    state = None if cache is None else cache.get("mlstm")
    if state is not None and q.shape[2] == 1 and _may_step(boundaries):
        token = (t.squeeze(2) for t in (q, k, v, igate, fgate))
        h = mlstm_step(*token, state, eps=config.cell_eps, backend=config.kernel_backend)
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
        eps=config.cell_eps,
        backend=config.kernel_backend,
    )
    if cache is not None:
        h, cache["mlstm"] = h
    return h


def run_slstm(
    config: XLSTMConfig,
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    boundaries: Tensor | None,
    cache: dict | None,
) -> Tensor:
    """The sLSTM cell over ``s`` tokens; shapes as in ``slstm_scan``, the cache's key is "slstm"."""
    state = None if cache is None else cache.get("slstm")
    if state is not None and gate_preacts.shape[1] == 1 and _may_step(boundaries):
        token = gate_preacts.squeeze(1)
        h = slstm_step(token, recurrent_weight, bias, state, backend=config.kernel_backend)
        return h.unsqueeze(1)
    h = slstm_scan(
        gate_preacts,
        recurrent_weight,
        bias,
        state,
        return_last_state=cache is not None,
        boundaries=boundaries,
        backend=config.kernel_backend,
    )
    if cache is not None:
        h, cache["slstm"] = h
    return h


def run_conv(
    config: XLSTMConfig,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    boundaries: Tensor | None,
    cache: dict | None,
) -> Tensor:
    """Causal convolution and SiLU of ``x [b, s, c]``; the cache's key is "conv"."""
    y = causal_conv1d(
        x,
        weight,
        bias,
        None if cache is None else cache.get("conv"),
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
    """LayerNorm of each head of ``h [..., heads, d]``, times ``sigmoid(ogate)`` of that shape."""
    return multihead_norm(
        h, weight, "layernorm", config.norm_eps, gate=ogate, backend=config.kernel_backend
    )


def _may_step(boundaries: Tensor | None) -> bool:
    """The step kernels know no boundaries and record no gradient."""
    return boundaries is None and not torch.is_grad_enabled()
