"""What follows the cell of a classic mLSTM block: the norm of each head, a skip and a gate."""

from torch import Tensor

from xlstm_kernels.common.checks import check_choice, check_float, check_like, check_no_tangents
from xlstm_kernels.gated import gated_skip
from xlstm_kernels.norm.norm import multihead_norm, norm_backend


def norm_gated_skip(
    h: Tensor,
    weight: Tensor,
    kind: str,
    eps: float,
    skip: Tensor,
    x: Tensor,
    gate: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """`(norm(h) + skip * x) * silu(gate)` (arXiv 2405.04517, figure 11).

    Args:
        h: What the cell returns, [b, heads, s, d]; d is normalised.
        weight: Scale of the norm, [heads * d].
        kind: "layernorm" or "rmsnorm".
        eps: Added to the variance or the mean square.
        skip: [heads * d].
        x: [s, b, heads * d].
        gate: [s, b, heads * d].
        backend: "torch", "triton" or "numba"; None for the best one. On Triton it is one kernel,
            and elsewhere `multihead_norm` and `gated_skip`.

    Returns:
        [s, b, heads * d] in the dtype of h.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation on another backend than "torch".
    """
    check_float("h", h, 4, "[b, heads, s, d]")
    b, heads, s, d = h.shape
    for name, one in (("weight", weight), ("skip", skip)):
        check_like(name, one, (heads * d,), "[heads * d]", h)
    for name, one in (("x", x), ("gate", gate)):
        check_like(name, one, (s, b, heads * d), "[s, b, heads * d]", h)
    check_choice("kind", kind, ("layernorm", "rmsnorm"))
    if norm_backend(h, backend) == "triton":
        from xlstm_kernels.norm.skip_triton import norm_gated_skip_triton

        check_no_tangents("norm_gated_skip", h, weight, skip, x, gate)
        return norm_gated_skip_triton(h, weight, kind, eps, skip, x, gate)
    normed = multihead_norm(h, weight, kind, eps, layout="by head", backend=backend)
    return gated_skip(normed.view(s, b, heads * d), skip, x, gate, backend=backend)


def norm_gated_skip_again(
    d_y: Tensor,
    h: Tensor,
    weight: Tensor,
    kind: str,
    eps: float,
    skip: Tensor,
    x: Tensor,
    gate: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of h, weight, skip, x and gate, and the result in place of its gradient.

    It is one Triton kernel, for a backward pass that needs both. Arguments but d_y are those of
    `norm_gated_skip`, and are not checked.

    Args:
        d_y: Gradient of the result, contiguous [s, b, heads * d]. It is overwritten by the result.
        h: [b, heads, s, d].
        weight: [heads * d].
        kind: "layernorm" or "rmsnorm".
        eps: Added to the variance or the mean square.
        skip: [heads * d].
        x: [s, b, heads * d].
        gate: [s, b, heads * d].

    Raises:
        NotImplementedError: For forward-mode differentiation.
    """
    from xlstm_kernels.norm.skip_triton import norm_gated_skip_again_triton

    check_no_tangents("norm_gated_skip_again", d_y, h, weight, skip, x, gate)
    return norm_gated_skip_again_triton(d_y, h, weight, kind, eps, skip, x, gate)
