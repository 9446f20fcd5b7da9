"""Normalisation of each head's output on its own."""

from torch import Tensor
from torch.nn.functional import layer_norm

from xlstm_kernels.checks import check_choice, check_float, check_like, compute_dtype


def multihead_norm(x: Tensor, weight: Tensor, kind: str, eps: float) -> Tensor:
    """Normalise x [..., heads, d] over d and scale it by weight [heads * d]; same shape and dtype.

    `kind` is "layernorm" (mean subtracted; the head norm of both xLSTM papers) or "rmsnorm". No
    bias. Computed in float32, in float64 for float64 input. Raises ValueError for wrong shapes,
    dtypes, devices or an unknown kind.
    """
    if x.ndim < 2:
        raise ValueError(
            f"x has shape {list(x.shape)}, but must be [..., heads, d]; split its last axis by head"
        )
    check_float("x", x, x.ndim, "[..., heads, d]")
    heads, d = x.shape[-2:]
    check_like("weight", weight, (heads * d,), "[heads * d]", x)
    check_choice("kind", kind, ("layernorm", "rmsnorm"))
    dtype = compute_dtype(x.dtype)
    wide = x.to(dtype)
    if kind == "layernorm":
        normed = layer_norm(wide, (d,), eps=eps)
    else:
        normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed * weight.to(dtype).view(heads, d)).to(x.dtype)
