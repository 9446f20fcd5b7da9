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

# layout -> axes of x
LAYOUTS = {"heads last": "[..., heads, d]", "row": "[..., d]", "by head": "[b, heads, s, d]"}


def multihead_norm(
    x: Tensor,
    weight: Tensor,
    kind: str,
    eps: float,
    *,
    gate: Tensor | None = None,
    layout: str = "heads last",
    backend: str | None = None,
) -> Tensor:
    """Normalise each head and scale it; computed in float32 (float64 for float64), rounded once.

    Args:
        x: [..., heads, d]; d is normalised. Other layouts have other axes.
        weight: Scale [heads * d]. There is no bias.
        kind: "layernorm" (mean subtracted; the head norm of both xLSTM papers) or "rmsnorm".
        eps: Added to the variance or the mean square.
        gate: Its sigmoid multiplies the result (the output gate of the 7B-style block, arXiv
            2503.13427, figure 8). It has the shape of x; None means no gate.
        layout: "heads last"; "row" for x [..., d], one head as wide as a row; or "by head" for x
            [b, heads, s, d], as cells return it, and a result [s * b, heads * d], as products take
            it.
        backend: "torch", "triton" or "numba"; None for the best one.

    Returns:
        A tensor of the dtype of x and, but for "by head", of its shape.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation on another backend than "torch".
    """
    check_choice("layout", layout, LAYOUTS)
    axes = LAYOUTS[layout]
    if x.ndim < 2 and layout != "row":
        raise ValueError(
            f"x has shape {list(x.shape)}, but must be {axes}; split its last axis by head"
        )
    check_float("x", x, 4 if layout == "by head" else x.ndim, axes)
    shape = x.shape
    heads, d = 1 if layout == "row" else shape[1 if layout == "by head" else -2], shape[-1]
    check_like("weight", weight, (heads * d,), "[heads * d]", x)
    check_choice("kind", kind, ("layernorm", "rmsnorm"))
    if gate is not None:
        check_like("gate", gate, tuple(shape), axes, x)
    chosen = norm_backend(x, backend)
    if chosen != "torch":
        check_no_tangents("multihead_norm", x, weight, gate)
    if chosen == "triton":
        from xlstm_kernels.norm.triton import multihead_norm_triton

        return multihead_norm_triton(x, weight, kind, eps, gate, layout)
    if layout == "by head":
        x, gate = (None if t is None else t.permute(2, 0, 1, 3) for t in (x, gate))
    elif layout == "row":
        x, gate = (None if t is None else t.unsqueeze(-2) for t in (x, gate))
    if chosen == "numba":
        from xlstm_kernels.norm.numba import multihead_norm_numba

        y = multihead_norm_numba(x, weight, kind, eps, gate)
    else:
        y = _norm(x, weight, kind, eps, gate)
    return y.reshape(-1, heads * d) if layout == "by head" else y.reshape(shape)


def multihead_norm_again(
    d_y: Tensor, x: Tensor, weight: Tensor, kind: str, eps: float, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and gate, and the result of `multihead_norm` in place of its gradient.

    It is one Triton kernel, for a backward pass that needs both. Arguments are not checked.

    Args:
        d_y: Gradient of the result, contiguous [s * b, heads * d]. It is overwritten by the result.
        x: [b, heads, s, d].
        weight: Scale [heads * d].
        kind: "layernorm" or "rmsnorm".
        eps: Added to the variance or the mean square.
        gate: In the shape of x; its sigmoid multiplies the result.

    Raises:
        NotImplementedError: For forward-mode differentiation.
    """
    from xlstm_kernels.norm.triton import multihead_norm_again_triton

    check_no_tangents("multihead_norm_again", d_y, x, weight, gate)
    return multihead_norm_again_triton(d_y, x, weight, kind, eps, gate)


def add_norm(
    x: Tensor, added: Tensor, weight: Tensor, kind: str, eps: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """A residual sum, and the norm of its rows as `multihead_norm` computes it.

    Args:
        x: [..., d].
        added: The same shape and dtype.
        weight: Scale [d].
        kind: "layernorm" or "rmsnorm".
        eps: Added to the variance or the mean square.
        backend: "torch", "triton" or "numba"; None for the best one. On Triton it is one kernel.

    Returns:
        x + added, rounded to the dtype of x, and its norm in that dtype.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation on another backend than "torch".
    """
    check_float("x", x, x.ndim, "[..., d]")
    check_like("added", added, tuple(x.shape), "[..., d]", x)
    check_like("weight", weight, (x.shape[-1],), "[d]", x)
    check_choice("kind", kind, ("layernorm", "rmsnorm"))
    if added.dtype == x.dtype and norm_backend(x, backend) == "triton":
        from xlstm_kernels.norm.residual_triton import add_norm_triton

        check_no_tangents("add_norm", x, added, weight)
        return add_norm_triton(x, added, weight, kind, eps)
    total = x + added
    return total, multihead_norm(total, weight, kind, eps, layout="row", backend=backend)


def norm_beside(
    x: Tensor, weight: Tensor, kind: str, eps: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`x`, which goes on beside its norm, and the norm of its rows as of `multihead_norm`.

    On Triton the kernel of the backward pass adds up the gradients of both.

    Args:
        x: [..., d].
        weight: Scale [d].
        kind: "layernorm" or "rmsnorm".
        eps: Added to the variance or the mean square.
        backend: "torch", "triton" or "numba"; None for the best one.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation on another backend than "torch".
    """
    check_float("x", x, x.ndim, "[..., d]")
    check_like("weight", weight, (x.shape[-1],), "[d]", x)
    check_choice("kind", kind, ("layernorm", "rmsnorm"))
    if norm_backend(x, backend) == "triton":
        from xlstm_kernels.norm.residual_triton import norm_beside_triton

        check_no_tangents("norm_beside", x, weight)
        return norm_beside_triton(x, weight, kind, eps)
    return x, multihead_norm(x, weight, kind, eps, layout="row", backend=backend)


def _norm(x: Tensor, weight: Tensor, kind: str, eps: float, gate: Tensor | None) -> Tensor:
    """The PyTorch implementation, of x [..., heads, d]."""
    heads, d = x.shape[-2:]
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
