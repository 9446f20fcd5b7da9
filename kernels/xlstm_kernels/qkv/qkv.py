"""Block-diagonal q, k, v and gates that see all of them (xLSTM, arXiv 2405.04517, figure 11)."""

import torch
from torch import Tensor

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.common.checks import check_float, check_like, check_no_tangents
from xlstm_kernels.common.products import narrow_product
from xlstm_kernels.qkv.tiles import dense_tiles, joined_blocks, tiles_of_heads


def qkv_and_gates(
    convolved: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    gate_weight: Tensor,
    heads: int,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys of the convolved input, values of the input itself, and gates of all three.

    Args:
        convolved: [b, s, inner].
        x: [b, s, inner].
        qkv_weight: [3 * blocks, width, width] with blocks * width = inner: blocks (out, in) of q,
            then of k, then of v.
        gate_weight: [gates, 3 * inner]: columns for q, then for k, then for v.
        heads: Number of heads; it divides the number of blocks.
        backend: "torch", "triton" or "numba"; None for the best one.

    Returns:
        q, k, v [b, heads, s, inner / heads] in the dtype of x, and gates [b, s, gates] in float32
        (float64 for float64). How they lie in memory is up to the backend.

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation.
    """
    check_no_tangents("qkv_and_gates", convolved, x, qkv_weight, gate_weight)
    check_qkv_arguments(convolved, x, qkv_weight, gate_weight, heads)
    chosen = qkv_backend(x, qkv_weight.shape[2], heads, backend)
    if chosen == "triton":
        from xlstm_kernels.qkv.triton import qkv_and_gates_triton

        matrices = tiles_of_heads(qkv_weight, heads)
        return qkv_and_gates_triton(convolved, x, matrices, gate_weight, heads)
    if chosen == "numba":
        from xlstm_kernels.qkv.numba import qkv_and_gates_numba

        return qkv_and_gates_numba(convolved, x, qkv_weight, gate_weight, heads)
    maps = zip((convolved, convolved, x), qkv_weight.chunk(3), strict=True)
    q, k, v = (block_diagonal(source, weight, heads) for source, weight in maps)
    return q, k, v, _project_heads(gate_weight, q, k, v)


def check_qkv_arguments(
    convolved: Tensor, x: Tensor, qkv_weight: Tensor, gate_weight: Tensor, heads: int
) -> None:
    """Raise for what `qkv_and_gates` cannot take."""
    check_float("x", x, 3, "[b, s, inner]")
    check_like("convolved", convolved, tuple(x.shape), "[b, s, inner]", x)
    check_float("qkv_weight", qkv_weight, 3, "[3 * blocks, width, width]")
    blocks, width = len(qkv_weight) // 3, qkv_weight.shape[2]
    inner = x.shape[2]
    if blocks * width != inner or blocks % heads:
        raise ValueError(
            f"qkv_weight has {len(qkv_weight)} blocks of width {width}, but x has {inner} columns "
            f"and {heads} heads; pass 3 * {inner} / {width} blocks, a multiple of 3 * {heads}"
        )
    check_like(
        "qkv_weight", qkv_weight, (3 * blocks, width, width), "[3 * blocks, width, width]", x
    )
    gates = len(gate_weight)
    check_like("gate_weight", gate_weight, (gates, 3 * inner), "[gates, 3 * inner]", x)


def qkv_backend(x: Tensor, block: int, heads: int, backend: str | None) -> str:
    """Name of the backend that `qkv_and_gates` of x [b, s, inner] takes."""
    facts = {"steps": x.shape[1], "head_dim": x.shape[2] // heads, "elements": x.numel()}
    return select_backend("qkv_and_gates", backend, x, block=block, **facts)


def _project_heads(weight: Tensor, *qkv: Tensor) -> Tensor:
    """`weight [gates, 3 * heads * d]` times q, k and v [b, heads, s, d], giving [b, s, gates].

    The product is taken in float32, and of q, k and v as they lie: heads beside each other.
    """
    b = len(qkv[0])
    columns = weight.unflatten(1, (3, -1)).permute(1, 2, 0)  # [3, heads * d, gates]
    parts = (
        narrow_product(x.transpose(1, 2).flatten(2), c.expand(b, -1, -1))
        for x, c in zip(qkv, columns, strict=True)
    )
    return sum(parts)


def block_diagonal(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """A block-diagonal linear map, its result by heads; the PyTorch implementation.

    Blocks of 4 x 4 are too small for fast matrix products, so several are put into one dense tile
    with zeros between them.

    Args:
        x: [b, s, blocks * width].
        weight: [blocks, out, in] with in = out = width.
        heads: Number of heads; it divides the number of blocks.

    Returns:
        [b, heads, s, head_dim] with head_dim = blocks * width / heads. Tokens lie as those of x, so
        that nothing is put in order before the cell or after it.
    """
    joined = joined_blocks(len(weight) // heads, weight.shape[2])
    product = _TileProducts.apply(x, dense_tiles(weight, joined))
    return product.unflatten(-1, (heads, -1)).transpose(1, 2)


class _TileProducts(torch.autograd.Function):
    """x [b, s, tiles * tile] times a matrix [out, in] for each tile, in the order of x."""

    @staticmethod
    def forward(ctx, x, matrices):
        ctx.save_for_backward(x, matrices)
        out = _empty_like(x)
        tile = matrices.shape[-1]
        torch.bmm(_by_tile(x, tile), matrices.mT, out=_by_tile(out, tile))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, matrices = ctx.saved_tensors
        tile = matrices.shape[-1]
        d_out, d_x = _empty_like(x), _empty_like(x)
        d_out.copy_(grad)
        d_out = _by_tile(d_out, tile)
        torch.bmm(d_out, matrices, out=_by_tile(d_x, tile))
        return d_x, torch.bmm(d_out.mT, _by_tile(x, tile))


def _sequence_first(x: Tensor) -> bool:
    """Whether the tokens of x [b, s, c] lie in the order of the sequence, then of the batch."""
    return x.stride(0) < x.stride(1)


def _empty_like(x: Tensor) -> Tensor:
    """A tensor like x [b, s, c], without gaps and in its order of tokens."""
    b, s, c = x.shape
    return x.new_empty(s, b, c).transpose(0, 1) if _sequence_first(x) else x.new_empty(b, s, c)


def _by_tile(x: Tensor, tile: int) -> Tensor:
    """x [b, s, tiles * tile] as [tiles, tokens, tile], without a copy."""
    tokens = x.transpose(0, 1) if _sequence_first(x) else x
    return tokens.reshape(-1, x.shape[-1] // tile, tile).transpose(0, 1)
