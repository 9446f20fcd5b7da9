"""What precedes the cell of a classic mLSTM block: the convolution, then q, k, v and gates."""

from torch import Tensor

from xlstm_kernels.common.checks import check_float, check_no_tangents
from xlstm_kernels.conv.conv import causal_conv1d, check_conv_arguments, conv_backend
from xlstm_kernels.qkv.qkv import check_qkv_arguments, qkv_and_gates, qkv_backend
from xlstm_kernels.qkv.tiles import tiles_of_heads


def conv_qkv_and_gates(
    packed: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    qkv_weight: Tensor,
    gate_weight: Tensor,
    heads: int,
    initial_state: Tensor | None = None,
    *,
    boundaries: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`causal_conv1d` with SiLU of one half of a projection, and `qkv_and_gates` of both of these.

    Args:
        packed: The projection [b, s, 2 * inner]: the input x, and beside it what the cell does not
            see.
        conv_weight: [inner, width].
        conv_bias: [inner] or None.
        qkv_weight: As for `qkv_and_gates`.
        gate_weight: As for `qkv_and_gates`.
        heads: Number of heads.
        initial_state: The inputs before x, oldest first, [b, inner, width - 1], or None for zeros.
        boundaries: bool [b, s], True at the first token of a document, or None.
        backend: "torch", "triton" or "numba"; None for the best ones. On Triton all gradients of
            the projection are added up in kernels, into one tensor.

    Returns:
        The convolved x [b, s, inner], the second half of `packed` (a view), and what
        `qkv_and_gates` returns.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation.
    """
    check_float("packed", packed, 3, "[b, s, 2 * inner]")
    x, beside = packed.chunk(2, dim=-1)
    check_conv_arguments(x, conv_weight, conv_bias, initial_state, boundaries)
    check_qkv_arguments(x, x, qkv_weight, gate_weight, heads)
    of_conv = conv_backend(x, initial_state, backend)
    if of_conv == qkv_backend(x, qkv_weight.shape[2], heads, backend) == "triton":
        from xlstm_kernels.qkv.convolved_triton import conv_qkv_and_gates_triton

        weights = conv_weight, conv_bias, qkv_weight, gate_weight
        check_no_tangents("conv_qkv_and_gates", packed, *weights, initial_state)
        conv = conv_weight, conv_bias, initial_state, boundaries
        return conv_qkv_and_gates_triton(
            packed, *conv, tiles_of_heads(qkv_weight, heads), gate_weight, heads
        )
    convolved = causal_conv1d(
        x,
        conv_weight,
        conv_bias,
        initial_state,
        activation="silu",
        boundaries=boundaries,
        backend=backend,
    )
    results = qkv_and_gates(convolved, x, qkv_weight, gate_weight, heads, backend=backend)
    return convolved, beside, *results
