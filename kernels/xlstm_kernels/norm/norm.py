"""Normalisation of each head's output on its own, and the output gate that follows it."""

from torch import Tensor
from torch.nn.functional import layer_norm

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.common.checks import (
    check_choice,
    check_float,
    check_like,
    check_no_tangents,
    compute_dtype,
)


def multihead_norm(
    x: Tensor,
    weight: Tensor,
    kind: str,
    eps: float,
    *,
    gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalise each head and scale it; computed in float32 (float64 for float64), rounded once.

    Args:
        x: [..., heads, d]; d is normalised.
        weight: Scale [heads * d]. There is no bias.
        kind: "layernorm" (mean subtracted; the head norm of both xLSTM papers) or "rmsnorm".
        eps: Added to the variance or the mean square.
        gate: Its sigmoid multiplies the result (the output gate of the 7B-style block, arXiv
            2503.13427, figure 8). It has the shape of x; None means no gate.
        backend: "torch", "triton" or "numba"; None for the best one.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation on another backend than "torch".
    """
    if x.ndim < 2:
        raise ValueError(
            f"x has shape {list(x.shape)}, but must be [..., heads, d]; split its last axis by head"
        )
    check_float("x", x, x.ndim, "[..., heads, d]")
    heads, d = x.shape[-2:]
    check_like("weight", weight, (heads * d,), "[heads * d]", x)
    check_choice("kind", kind, ("layernorm", "rmsnorm"))
    if gate is not None:
        check_like("gate", gate, tuple(x.shape), "[..., heads, d]", x)
    chosen = norm_backend(x, backend)
    if chosen != "torch":
        check_no_tangents("multihead_norm", x, weight, gate)
    if chosen == "triton":
        from xlstm_kernels.norm.triton import multihead_norm_triton

        return multihead_norm_triton(x, weight, kind, eps, gate)
    if chosen == "numba":
        from xlstm_kernels.norm.numba import multihead_norm_numba

        return multihead_norm_numba(x, weight, kind, eps, gate)
    dtype = compute_dtype(x.dtype)
    wide = x.to(dtype)
    if kind == "layernorm":
        normed = layer_norm(wide, (d,), eps=eps)
    else:
        normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = normed * weight.to(dtype).view(heads, d)
    if gate is not None:
        normed = normed * gate.to(dtype).sigmoid()
    return normed.to(x.dtype)


def norm_backend(x: Tensor, backend: str | None) -> str:
    """Name of the backend that `multihead_norm` of `x` takes."""
    return select_backend("multihead_norm", backend, x, d=x.shape[-1], elements=x.numel())
