"""The classic mLSTM block's output: a learnable skip and a gate with SiLU (arXiv 2405.04517)."""

from torch import Tensor
from torch.nn.functional import silu

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.common.checks import check_float, check_like, check_no_tangents


def gated_skip(
    h: Tensor, skip: Tensor, x: Tensor, gate: Tensor, *, backend: str | None = None
) -> Tensor:
    """`(h + skip * x) * silu(gate)`.

    Args:
        h: [rows, batch, width].
        skip: [width].
        x: Like h.
        gate: Like h.
        backend: "torch" or "numba"; None for the best one.

    Returns:
        [rows, batch, width] in the dtype of h.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation on another backend than "torch".
    """
    axes = "[rows, batch, width]"
    check_float("h", h, 3, axes)
    for name, one in (("x", x), ("gate", gate)):
        check_like(name, one, tuple(h.shape), axes, h)
    check_like("skip", skip, (h.shape[2],), "[width]", h)
    facts = {"width": h.shape[2], "elements": h.numel()}
    if select_backend("gated_skip", backend, h, **facts) == "numba":
        from xlstm_kernels.gated.numba_skip import gated_skip_numba

        check_no_tangents("gated_skip", h, skip, x, gate)
        return gated_skip_numba(h, skip, x, gate)
    return ((h + skip * x) * silu(gate)).to(h.dtype)
