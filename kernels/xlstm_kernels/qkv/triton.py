"""q, k, v and gates of the classic mLSTM on Triton: one pass over memory forward, one backward.

Nothing but the inputs is kept: the backward pass computes q, k and v again, a tile in registers.
The gradient of the pre-activations enters its products as the sum of two narrow numbers, which has
16 bits. Gradients of the weights are summed by each program over its tokens and then over programs,
in float32 and always in the same order.

Float32 inputs with more than 16 gates spill some registers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_kernels.common import triton_launch
from xlstm_kernels.common.triton_launch import Launch, run_all
from xlstm_kernels.qkv.tiles import joined_blocks

__all__ = ["qkv_and_gates_triton", "unsupported_reason"]

TILES = (16, 32)
TOKENS = 32, 16  # of a tile, forward and backward: more of them spill registers
PROGRAMS = 528  # of the backward pass: four for each of 132 processors
SIZES = ["tokens"]  # varies without recompilation


def unsupported_reason(
    like: Tensor, *, block: int, head_dim: int, asked: bool, **facts: object
) -> str | None:
    """Why this backend cannot run such a call, with the remedy; None if it can."""
    reason = triton_launch.unsupported_reason(like, asked=asked)
    if reason is None:
        tile = block * joined_blocks(head_dim // block, block)
        if tile not in TILES:
            sizes = " or ".join(map(str, TILES))
            reason = (
                f"blocks of {block} in heads of {head_dim} make tiles of {tile}, and the Triton "
                f"kernels take {sizes}; use heads that are a multiple of 16, or 'torch'"
            )
    return reason


@triton.jit
def load_gate_weight(gate_weight, i_part, width, gates, o_c, o_g):
    """What the gates weight the channels o_c of q, k or v by, [o_c, o_g]."""
    p_weight = gate_weight + (i_part * width + o_c)[:, None] * gates + o_g[None, :]
    return tl.load(p_weight, mask=(o_g < gates)[None, :], other=0.0)


@triton.jit(do_not_specialize=SIZES)
def qkv_forward(
    x_qk, x_v, matrices, gate_weight, q, k, v, preacts, tokens, width, tiles, gates,
    stride_qk, stride_v,
    TILE: tl.constexpr, GATES: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BT tokens of q, k, v [tokens, width] and preacts [tokens, gates]; grid: tiles of tokens."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_g = tl.arange(0, GATES)
    o_tile = tl.arange(0, TILE)
    m_t = (o_t < tokens)[:, None]
    b_preacts = tl.zeros([BT, GATES], tl.float32)
    for i_tile in tl.range(0, tiles, num_stages=3):
        # [TILE]
        o_c = i_tile * TILE + o_tile
        # [BT, TILE]
        b_qk = tl.load(x_qk + o_t[:, None] * stride_qk + o_c[None, :], mask=m_t, other=0.0)
        b_v = tl.load(x_v + o_t[:, None] * stride_v + o_c[None, :], mask=m_t, other=0.0)
        o_y = o_t[:, None] * width + o_c[None, :]
        for i_part in tl.static_range(3):
            # [in, out]
            p_matrix = matrices + (i_part * tiles + i_tile) * (TILE * TILE)
            b_matrix = tl.load(p_matrix + o_tile[None, :] * TILE + o_tile[:, None])
            b_x = b_v if i_part == 2 else b_qk
            # [BT, out]
            b_y = tl.dot(b_x, b_matrix, input_precision=PRECISION).to(b_qk.dtype)
            y = q if i_part == 0 else (k if i_part == 1 else v)
            tl.store(y + o_y, b_y, mask=m_t)
            b_weight = load_gate_weight(gate_weight, i_part, width, gates, o_c, o_g)
            b_preacts = tl.dot(b_y, b_weight, b_preacts, input_precision=PRECISION)
    o_preacts = o_t[:, None] * gates + o_g[None, :]
    tl.store(preacts + o_preacts, b_preacts, mask=m_t & (o_g < gates)[None, :])


@triton.jit
def add_gradients(
    b_x, b_dy, b_high, b_low, b_matrix, b_weight, b_dx, b_dmatrix, b_dweight,
    NARROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one projection adds to the gradients of x, of its matrix [in, out], of the weight.

    No result of a product is transposed: Triton before 3.7.1 does that wrongly on Hopper.
    """
    b_back = tl.trans(b_weight)
    # [tokens, out]
    b_dy = tl.dot(b_high, b_back, b_dy.to(tl.float32), input_precision=PRECISION)
    if NARROW:
        b_dy = tl.dot(b_low, b_back, b_dy, input_precision=PRECISION)
    b_dy = b_dy.to(b_x.dtype)
    b_y = tl.dot(b_x, tl.trans(b_matrix), input_precision=PRECISION).to(b_x.dtype)
    # [gates, out]
    b_dweight = tl.dot(tl.trans(b_high), b_y, b_dweight, input_precision=PRECISION)
    if NARROW:
        b_dweight = tl.dot(tl.trans(b_low), b_y, b_dweight, input_precision=PRECISION)
    b_dmatrix = tl.dot(tl.trans(b_x), b_dy, b_dmatrix, input_precision=PRECISION)
    b_dx = tl.dot(b_dy, b_matrix, b_dx, input_precision=PRECISION)
    return b_dx, b_dmatrix, b_dweight


@triton.jit(do_not_specialize=[*SIZES, "programs"])
def qkv_backward(
    d_q, d_k, d_v, d_preacts, d_more, x_qk, x_v, matrices, gate_weight, d_qk, d_xv, d_matrices,
    d_weight, tokens, width, tiles, gates, programs, stride_qk, stride_v,
    TILE: tl.constexpr, GATES: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """One tile of channels; its tokens are dealt out to `programs` programs: grid programs * tiles.

    d_matrices is float32 [programs, 3, tiles, in, out], d_weight float32
    [programs, 3, GATES, width]. d_more is added to d_qk.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_tile, i_part = i_program % tiles, i_program // tiles
    o_g, o_tile = tl.arange(0, GATES), tl.arange(0, TILE)
    # [TILE]
    o_c = i_tile * TILE + o_tile
    # [out, in]
    o_matrix = o_tile[:, None] * TILE + o_tile[None, :]
    b_wq = tl.load(matrices + i_tile * (TILE * TILE) + o_matrix)
    b_wk = tl.load(matrices + (tiles + i_tile) * (TILE * TILE) + o_matrix)
    b_wv = tl.load(matrices + (2 * tiles + i_tile) * (TILE * TILE) + o_matrix)
    # [out, GATES]
    b_gq = load_gate_weight(gate_weight, 0, width, gates, o_c, o_g)
    b_gk = load_gate_weight(gate_weight, 1, width, gates, o_c, o_g)
    b_gv = load_gate_weight(gate_weight, 2, width, gates, o_c, o_g)
    b_dwq = tl.zeros([TILE, TILE], tl.float32)
    b_dwk = tl.zeros([TILE, TILE], tl.float32)
    b_dwv = tl.zeros([TILE, TILE], tl.float32)
    b_dgq = tl.zeros([GATES, TILE], tl.float32)
    b_dgk = tl.zeros([GATES, TILE], tl.float32)
    b_dgv = tl.zeros([GATES, TILE], tl.float32)
    for start in tl.range(i_part * BT, tokens, programs * BT, num_stages=2):
        # [BT]
        o_t = start + tl.arange(0, BT)
        m_t = (o_t < tokens)[:, None]
        o_y = o_t[:, None] * width + o_c[None, :]
        # [BT, GATES]
        o_preacts = o_t[:, None] * gates + o_g[None, :]
        b_d = tl.load(d_preacts + o_preacts, mask=m_t & (o_g < gates)[None, :], other=0.0)
        b_high = b_d.to(x_qk.dtype.element_ty)
        b_low = (b_d - b_high.to(tl.float32)).to(x_qk.dtype.element_ty)  # zero unless narrow
        # [BT, TILE]
        b_qk = tl.load(x_qk + o_t[:, None] * stride_qk + o_c[None, :], mask=m_t, other=0.0)
        b_v = tl.load(x_v + o_t[:, None] * stride_v + o_c[None, :], mask=m_t, other=0.0)
        b_dq = tl.load(d_q + o_y, mask=m_t, other=0.0)
        b_dk = tl.load(d_k + o_y, mask=m_t, other=0.0)
        b_dv = tl.load(d_v + o_y, mask=m_t, other=0.0)
        b_zero = tl.zeros([BT, TILE], tl.float32)
        b_dx, b_dwq, b_dgq = add_gradients(
            b_qk, b_dq, b_high, b_low, b_wq, b_gq, b_zero, b_dwq, b_dgq, NARROW, PRECISION
        )
        b_dx, b_dwk, b_dgk = add_gradients(
            b_qk, b_dk, b_high, b_low, b_wk, b_gk, b_dx, b_dwk, b_dgk, NARROW, PRECISION
        )
        if d_more is not None:
            b_dx += tl.load(d_more + o_y, mask=m_t, other=0.0).to(tl.float32)
        tl.store(d_qk + o_y, b_dx.to(d_qk.dtype.element_ty), mask=m_t)
        b_dx, b_dwv, b_dgv = add_gradients(
            b_v, b_dv, b_high, b_low, b_wv, b_gv, b_zero, b_dwv, b_dgv, NARROW, PRECISION
        )
        tl.store(d_xv + o_y, b_dx.to(d_xv.dtype.element_ty), mask=m_t)
    d_matrices += (i_part * 3 * tiles + i_tile) * (TILE * TILE) + o_matrix
    tl.store(d_matrices, b_dwq)
    tl.store(d_matrices + tiles * (TILE * TILE), b_dwk)
    tl.store(d_matrices + 2 * tiles * (TILE * TILE), b_dwv)
    p_weight = d_weight + (i_part * 3 * GATES + o_g)[:, None] * width + o_c[None, :]
    tl.store(p_weight, b_dgq)
    tl.store(p_weight + GATES * width, b_dgk)
    tl.store(p_weight + 2 * GATES * width, b_dgv)


def _shared(x_qk, x_v, matrices, gate_weight, precision: str) -> dict[str, object]:
    """What both launches take."""
    tokens, width = x_qk.shape
    gates = gate_weight.shape[-1]
    arguments = {"x_qk": x_qk, "x_v": x_v, "matrices": matrices, "gate_weight": gate_weight}
    arguments |= {"tokens": tokens, "width": width, "tiles": matrices.shape[1], "gates": gates}
    arguments |= {"stride_qk": x_qk.stride(0), "stride_v": x_v.stride(0)}
    arguments |= {"TILE": matrices.shape[-1], "GATES": max(triton.next_power_of_2(gates), 16)}
    return arguments | {"PRECISION": precision}


def plan_forward(x_qk, x_v, matrices, gate_weight, q, k, v, preacts, precision: str) -> Launch:
    """The forward launch; only x_qk and x_v may have gaps between tokens."""
    arguments = _shared(x_qk, x_v, matrices, gate_weight, precision)
    arguments |= {"q": q, "k": k, "v": v, "preacts": preacts, "BT": TOKENS[0]}
    grid = (triton.cdiv(len(x_qk), TOKENS[0]),)
    return Launch("qkv and gates", qkv_forward, grid, arguments, 4, 3)


def plan_backward(
    d_q, d_k, d_v, d_preacts, d_more, x_qk, x_v, matrices, gate_weight, d_qk, d_xv, precision: str
) -> tuple[Launch, Tensor, Tensor]:
    """The backward launch, and where it leaves the parts of the gradients of both weights.

    These are [programs, 3, tiles, in, out] and [programs, 3, GATES, width].
    """
    arguments = _shared(x_qk, x_v, matrices, gate_weight, precision)
    tokens, width = x_qk.shape
    _, tiles, tile, _ = matrices.shape
    programs = min(triton.cdiv(tokens, TOKENS[1]), max(PROGRAMS // tiles, 1))
    d_matrices = x_qk.new_empty(programs, 3, tiles, tile, tile, dtype=torch.float32)
    d_weight = x_qk.new_empty(programs, 3, arguments["GATES"], width, dtype=torch.float32)
    arguments |= {"d_q": d_q, "d_k": d_k, "d_v": d_v, "d_preacts": d_preacts, "d_qk": d_qk}
    arguments |= {"d_more": d_more, "d_xv": d_xv, "d_matrices": d_matrices, "d_weight": d_weight}
    arguments |= {"programs": programs, "BT": TOKENS[1], "NARROW": x_qk.dtype != torch.float32}
    grid = (programs * tiles,)
    launch = Launch("qkv and gates gradients", qkv_backward, grid, arguments, 4, 2)
    return launch, d_matrices, d_weight


def _precision(x: Tensor) -> str:
    """Of float32 products: nearly float32 on tensor cores, exact elsewhere."""
    return "tf32x3" if triton_launch.architecture(x.device).startswith("sm_") else "ieee"


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _results(x: Tensor, gates: int) -> list[Tensor]:
    tokens, width = x.shape
    q, k, v = (x.new_empty(tokens, width) for _ in range(3))
    return [q, k, v, x.new_empty(tokens, gates, dtype=torch.float32)]


@torch.library.custom_op("xlstm_kernels::qkv_and_gates_triton", mutates_args=())
def project(x_qk: Tensor, x_v: Tensor, matrices: Tensor, gate_weight: Tensor) -> list[Tensor]:
    """q, k, v [tokens, width] and the gates' product, float32 [tokens, gates].

    x_qk and x_v are [tokens, width], matrices [3, tiles, out, in], gate_weight [3, width, gates].
    """
    results = _results(x_qk, gate_weight.shape[-1])
    weights = matrices.contiguous(), gate_weight.contiguous()
    inputs = _readable(x_qk), _readable(x_v), *weights
    run_all([plan_forward(*inputs, *results, _precision(x_qk))], x_qk)
    return results


@project.register_fake
def _(x_qk, x_v, matrices, gate_weight):
    return _results(x_qk, gate_weight.shape[-1])


@torch.library.custom_op("xlstm_kernels::qkv_and_gates_triton_backward", mutates_args=())
def project_gradients(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_preacts: Tensor,
    d_more: Tensor | None,
    x_qk: Tensor,
    x_v: Tensor,
    matrices: Tensor,
    gate_weight: Tensor,
) -> list[Tensor]:
    """Gradients of x_qk and x_v, and in float32 of matrices and gate_weight.

    d_more is a gradient of x_qk from elsewhere, [tokens, width]; it is added.
    """
    d_qk, d_xv = (x.new_empty(x.shape) for x in (x_qk, x_v))
    grads = (None if x is None else x.contiguous() for x in (d_q, d_k, d_v, d_preacts, d_more))
    weights = matrices.contiguous(), gate_weight.contiguous()
    inputs = _readable(x_qk), _readable(x_v), *weights
    launch, d_matrices, d_weight = plan_backward(*grads, *inputs, d_qk, d_xv, _precision(x_qk))
    run_all([launch], x_qk)
    d_weight = d_weight.sum(0)[:, : gate_weight.shape[-1]]
    return [d_qk, d_xv, d_matrices.sum(0).mT.contiguous(), d_weight.mT.contiguous()]


@project_gradients.register_fake
def _(d_q, d_k, d_v, d_preacts, d_more, x_qk, x_v, matrices, gate_weight):
    wide = {"dtype": torch.float32}
    d_weights = (x.new_empty(x.shape, **wide) for x in (matrices, gate_weight))
    return [x_qk.new_empty(x_qk.shape), x_v.new_empty(x_v.shape), *d_weights]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grads):
    *d_x, d_matrices, d_weight = project_gradients(*grads, None, *ctx.saved_tensors)
    dtype = ctx.saved_tensors[2].dtype
    return *d_x, d_matrices.to(dtype), d_weight.to(dtype)


project.register_autograd(_differentiate, setup_context=_save)


def tokens_of(x: Tensor) -> Tensor:
    """x [b, s, c] as [s * b, c], in the order of the sequence, then of the batch."""
    return x.transpose(0, 1).flatten(0, 1)


def gate_columns(gate_weight: Tensor) -> Tensor:
    """Weights [gates, 3 * inner] as [3, inner, gates]."""
    return gate_weight.unflatten(1, (3, -1)).permute(1, 2, 0)


def by_head(results: Sequence[Tensor], b: int, heads: int) -> tuple[Tensor, ...]:
    """q, k, v [s * b, inner] as [b, heads, s, inner / heads], and gates [s * b, gates] by row."""
    *qkv, gates = results
    s = len(gates) // b
    q, k, v = (y.view(s, b, heads, -1).permute(1, 2, 0, 3) for y in qkv)
    return q, k, v, gates.view(s, b, -1).transpose(0, 1)


def qkv_and_gates_triton(
    convolved: Tensor, x: Tensor, matrices: Tensor, gate_weight: Tensor, heads: int
) -> tuple[Tensor, ...]:
    """Triton backend of `xlstm_kernels.qkv_and_gates` (checked arguments, same meaning).

    `matrices` [3 * tiles, out, in] are its blocks, some joined in each tile. Tokens are taken in
    the order of the sequence, then of the batch, and so do the results lie.
    """
    weights = matrices.unflatten(0, (3, -1)), gate_columns(gate_weight)
    results = project(tokens_of(convolved), tokens_of(x), *weights)
    return by_head(results, len(x), heads)
