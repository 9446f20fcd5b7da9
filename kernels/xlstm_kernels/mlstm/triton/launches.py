"""Launches of the mLSTM on Triton, forward and backward, and the tensors they fill.

Forward: gates, states, outputs. Backward: the normaliser's gradient, gradients of states, of v, of
q and k, of gates. A pass over states is two launches where batch and heads alone do not fill a GPU.
The passes are planned as lists of `Launch`, on any device: `triton_variants` plans on the meta
device for ahead-of-time compilation. Equations: triton_outputs, triton_gradients; decays and
precision: triton_gates. Products of bfloat16 accumulate in float32; float32 products are "tf32x3"
(nearly float32) on NVIDIA and exact on AMD.

Checked without a GPU only, in the interpreter and by ahead-of-time compilation: no time is known.
Chunks and rows of a batch are as many programs as there are; a state pass is sequential in chunks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.common.triton_launch import Launch
from xlstm_kernels.mlstm.triton.gates import (
    GATE_PLANES,
    GRADIENT_PLANES,
    gate_gradients_kernel,
    gates_kernel,
)
from xlstm_kernels.mlstm.triton.gradients import query_key_gradients_kernel
from xlstm_kernels.mlstm.triton.outputs import normalizer_gradients_kernel, outputs_kernel
from xlstm_kernels.mlstm.triton.states import PIECE, RESUME, WHOLE, states_kernel
from xlstm_kernels.mlstm.triton.tiles import (
    LARGEST_BLOCK,
    PROGRAMS,
    MlstmConfig,
    Tile,
    power_of_two,
    segments,
)

LONGEST_PREFIX = 512  # gates that the gate pass reduces at a time; more take spilled registers


class Options(NamedTuple):
    """What a pass depends on beside its tensors."""

    chunk_size: int
    exp_gate: bool
    normalize: bool
    eps: float
    bf16_states: bool
    precision: str  # of float32 products
    tiles: MlstmConfig
    soft_cap: float | None = None  # of gate pre-activations


class Sizes(NamedTuple):
    """Sizes of one call; T = chunks * L tokens with padding."""

    b: int
    heads: int
    s: int
    qk: int
    v: int
    L: int
    chunks: int

    @property
    def rows(self) -> int:
        """Independent recurrences."""
        return self.b * self.heads

    @property
    def plane(self) -> int:
        """Elements of one padded vector over time, all rows."""
        return self.rows * self.chunks * self.L


def sizes_of(q: Tensor, v: Tensor, chunk_size: int) -> Sizes:
    """Sizes of a call with these inputs."""
    b, heads, s, qk = q.shape
    return Sizes(b, heads, s, qk, v.shape[-1], chunk_size, -(-s // chunk_size))


def strides(prefix: str, x: Tensor) -> dict[str, int]:
    """Strides over batch, heads and time, by the names of the kernels' parameters."""
    return {f"stride_{prefix}{axis}": x.stride(i) for i, axis in enumerate("bhs")}


def readable(x: Tensor) -> Tensor:
    """`x` itself if the kernels can address it: unit stride last, a tile within 2^31 elements."""
    if x.stride(-1) == 1 and all(y >= 0 for y in x.stride()):
        if x.stride(-2) * LARGEST_BLOCK < 2**31:
            return x
    return x.contiguous()


class Forward(NamedTuple):
    """Results of the forward pass and what the backward pass needs of it."""

    h: Tensor  # [b, heads, s, v] in the dtype of q
    last_c: Tensor  # float32 [rows, qk, v]
    last_n: Tensor  # float32 [rows, qk]
    last_m: Tensor  # float32 [rows]
    gates: Tensor  # float32 [planes, rows, T]
    keep: Tensor  # float32 [rows, chunks]
    first: Tensor  # int32 [rows, T], or empty without boundaries
    states: Tensor  # [rows, chunks, qk, v] before each chunk
    n_states: Tensor  # float32 [rows, chunks, qk]
    inverse: Tensor  # float32 [rows, T], 1 / scale; empty without normalisation
    overlap: Tensor  # float32 [rows, T], n.q; empty without normalisation


def allocate_forward(
    q: Tensor, z: Sizes, *, normalize: bool, bf16_states: bool, bounded: bool, last: bool
) -> Forward:
    """Fresh tensors for all results of the forward pass."""

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=q.device)

    T = z.chunks * z.L
    vectors = (z.rows, T) if normalize else (0,)
    return Forward(
        h=new(z.b, z.heads, z.s, z.v, dtype=q.dtype),
        last_c=new(z.rows if last else 0, z.qk, z.v),
        last_n=new(z.rows if last else 0, z.qk),
        last_m=new(z.rows),
        gates=new(GATE_PLANES, z.rows, T),
        keep=new(z.rows, z.chunks),
        first=new(z.rows, T, dtype=torch.int32) if bounded else new(0, dtype=torch.int32),
        states=new(
            z.rows, z.chunks, z.qk, z.v,
            dtype=torch.bfloat16 if bf16_states else torch.float32,
        ),
        n_states=new(z.rows, z.chunks, z.qk),
        inverse=new(*vectors),
        overlap=new(*vectors),
    )  # fmt: skip


def cap_arguments(options: Options) -> dict[str, object]:
    """The soft cap, by the names of the kernels' parameters."""
    return {"cap": options.soft_cap or 0.0, "CAPPED": options.soft_cap is not None}


def gates_launch(i, f, m0, boundaries, out: Forward, z: Sizes, options: Options) -> Launch:
    """The gate pass."""
    per_program = min(max(z.rows * z.chunks // PROGRAMS, 1), z.chunks)
    programs = -(-z.chunks // per_program)
    scale = z.qk**-0.5
    arguments = {
        "igate": i, "fgate": f, "m0": m0, "starts": boundaries, "gates": out.gates,
        "keep": out.keep, "first": out.first, "last_m": out.last_m,
        **strides("i", i), **strides("f", f),
        "stride_sb": 0 if boundaries is None else boundaries.stride(0),
        "stride_ss": 0 if boundaries is None else boundaries.stride(1),
        "heads": z.heads, "s": z.s, "chunks": z.chunks, "chunks_per_program": per_program,
        "programs": programs, "log_scale": float(torch.tensor(scale, dtype=torch.float64).log()),
        "scale": scale, "plane": z.plane, "L": z.L,
        "PREFIX": max(min(power_of_two(z.s), LONGEST_PREFIX), 16), "EXP_GATE": options.exp_gate,
        "CARRIED": m0 is not None, "BOUNDED": boundaries is not None, **cap_arguments(options),
    }  # fmt: skip
    return Launch("gates", gates_kernel, (z.rows * programs,), arguments, 4, 1)


def states_launches(
    a, b, out: Forward, z: Sizes, options: Options, *, d_overlap, first, states, n_states, last,
    backward: bool,
) -> list[Launch]:  # fmt: skip
    """One pass over states; `first` and `last` are pairs (C, n), of None where there is none."""
    tile: Tile = options.tiles.states
    q_tiles, v_tiles = -(-z.qk // tile.inner), -(-z.v // tile.width)
    pieces = segments(z.rows * q_tiles * v_tiles, z.chunks)
    per_segment = -(-z.chunks // pieces)
    pieces = -(-z.chunks // per_segment)
    held = [None] * 3
    if pieces > 1:
        shape = (z.rows, pieces - 1)
        new = {"dtype": torch.float32, "device": a.device}
        held = [torch.empty(*shape, *more, **new) for more in ((z.qk, z.v), (z.qk,), ())]
    shared = {
        "a": a, "b": b, "gates": out.gates, "keep": out.keep,
        "inverse": out.inverse if backward else None, "d_overlap": d_overlap,
        "states": states, "n_states": n_states,
        "pieces_c": held[0], "pieces_n": held[1], "pieces_keep": held[2],
        **strides("a", a), **strides("b", b),
        "heads": z.heads, "s": z.s, "chunks": z.chunks, "chunks_per_segment": per_segment,
        "q_tiles": q_tiles, "v_tiles": v_tiles, "plane": z.plane,
        "QK": z.qk, "V": z.v, "L": z.L, "BQ": tile.inner, "BV": tile.width, "BL": tile.tokens,
        "BACKWARD": backward, "NORMALIZE": options.normalize, "EVEN_S": z.s % z.L == 0,
        "PRECISION": options.precision, "STAGES": tile.num_stages,
    }  # fmt: skip
    name = "state gradients" if backward else "states"
    whole = {"first_c": first[0], "first_n": first[1], "last_c": last[0], "last_n": last[1]}
    none = dict.fromkeys(whole)
    grid = z.rows * q_tiles * v_tiles

    def launch(suffix, phase, count, ends):
        more = {"segments": count, "PHASE": phase.value, "STORE_LAST": ends["last_c"] is not None}
        return Launch(
            name + suffix, states_kernel, (grid * count,), shared | ends | more,
            tile.num_warps, tile.num_stages,
        )  # fmt: skip

    if pieces == 1:
        return [launch("", WHOLE, 1, whole)]
    local = launch(" of segments", PIECE, pieces - 1, none)
    return [local, launch(" resumed", RESUME, pieces, whole)]


def outputs_launch(
    a, b, x, result, states, n_states, out: Forward, z: Sizes, options: Options, backward: bool
) -> Launch:
    """H from (q, k, v) and states, or backward dv from (k, q, d_h) and gradients of states."""
    tile: Tile = options.tiles.values if backward else options.tiles.outputs
    x_tiles = -(-z.v // tile.width)
    bounded = out.first.numel() > 0
    arguments = {
        "a": a, "b": b, "x": x, "out": result, "states": states, "n_states": n_states,
        "gates": out.gates, "first": out.first if bounded else None,
        "inverse": out.inverse if options.normalize else None,
        "overlap": out.overlap if options.normalize and not backward else None,
        **strides("a", a), **strides("b", b), **strides("x", x),
        "heads": z.heads, "s": z.s, "chunks": z.chunks, "x_tiles": x_tiles, "plane": z.plane,
        "eps": options.eps, "QK": z.qk, "V": z.v, "L": z.L, "BT": tile.tokens, "BA": tile.inner,
        "BX": tile.width, "BACKWARD": backward, "NORMALIZE": options.normalize, "BOUNDED": bounded,
        "EVEN_S": z.s % z.L == 0, "PRECISION": options.precision, "STAGES": tile.num_stages,
    }  # fmt: skip
    return Launch(
        "value gradients" if backward else "outputs", outputs_kernel,
        (z.plane // tile.tokens * x_tiles,), arguments, tile.num_warps, tile.num_stages,
    )  # fmt: skip


def plan_forward(
    q, k, v, i, f, C, n, m, boundaries, options: Options, return_last_state: bool
) -> tuple[Forward, list[Launch]]:
    """Results (not yet computed) and launches of the forward pass."""
    z = sizes_of(q, v, options.chunk_size)
    q, k, v = readable(q), readable(k), readable(v)
    out = allocate_forward(
        q, z, normalize=options.normalize, bf16_states=options.bf16_states,
        bounded=boundaries is not None, last=return_last_state,
    )  # fmt: skip
    last = (out.last_c, out.last_n) if return_last_state else (None, None)
    return out, [
        gates_launch(i, f, m, boundaries, out, z, options),
        *states_launches(
            k, v, out, z, options, d_overlap=None, first=(C, n), states=out.states,
            n_states=out.n_states, last=last, backward=False,
        ),
        outputs_launch(q, k, v, out.h, out.states, out.n_states, out, z, options, False),
    ]  # fmt: skip


class Gradients(NamedTuple):
    """Results of the backward pass; d_c and d_n are float32 [rows, qk, v] and [rows, qk]."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    di: Tensor
    df: Tensor
    d_c: Tensor
    d_n: Tensor


def allocate_gradients(q: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Gradients:
    """Fresh tensors for all gradients."""
    b, heads, s, qk = q.shape

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=q.device)

    rows, dim = b * heads, v.shape[-1]
    return Gradients(
        dq=new(b, heads, s, qk, dtype=q.dtype),
        dk=new(b, heads, s, qk, dtype=q.dtype),
        dv=new(b, heads, s, dim, dtype=q.dtype),
        di=new(b, heads, s, dtype=i.dtype),
        df=new(b, heads, s, dtype=f.dtype),
        d_c=new(rows, qk, dim),
        d_n=new(rows, qk),
    )


def plan_backward(
    q, k, v, i, f, d_h, d_last_c, d_last_n, out: Forward, options: Options
) -> tuple[Gradients, list[Launch]]:
    """Gradients (not yet computed) and launches of the backward pass."""
    z = sizes_of(q, v, options.chunk_size)
    q, k, v, d_h = readable(q), readable(k), readable(v), readable(d_h)
    grads = allocate_gradients(q, v, i, f)
    tile: Tile = options.tiles.keys
    x_tiles, tiles = -(-z.qk // tile.width), z.L // tile.tokens
    bounded = out.first.numel() > 0
    first = out.first if bounded else None

    def new(*shape):
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    d_states, d_n_states = torch.empty_like(out.states), torch.empty_like(out.n_states)
    parts = new(GRADIENT_PLANES, x_tiles, z.rows, z.chunks * z.L)
    across = new(z.rows, z.chunks, tiles * x_tiles)
    d_overlap, inverse = None, None
    launches = []
    if options.normalize:
        d_overlap, inverse = torch.empty_like(out.overlap), out.inverse
        tokens = min(32, z.L)
        arguments = {
            "h": out.h, "d_h": d_h, "gates": out.gates, "inverse": inverse, "overlap": out.overlap,
            "d_overlap": d_overlap, **strides("d", d_h), "heads": z.heads, "s": z.s,
            "padded": z.chunks * z.L, "plane": z.plane, "V": z.v, "BT": tokens,
            "BV": min(power_of_two(z.v), 128),
        }  # fmt: skip
        launches.append(
            Launch("normalizer gradients", normalizer_gradients_kernel, (z.plane // tokens,),
                   arguments, 4, 2)
        )  # fmt: skip
    launches += states_launches(
        q, d_h, out, z, options, d_overlap=d_overlap, first=(d_last_c, d_last_n), states=d_states,
        n_states=d_n_states, last=(grads.d_c, grads.d_n), backward=True,
    )  # fmt: skip
    launches.append(
        outputs_launch(k, q, d_h, grads.dv, d_states, d_n_states, out, z, options, True)
    )
    arguments = {
        "q": q, "k": k, "v": v, "d_h": d_h, "dq": grads.dq, "dk": grads.dk, "states": out.states,
        "d_states": d_states, "n_states": out.n_states, "d_n_states": d_n_states,
        "gates": out.gates, "first": first, "inverse": inverse, "d_overlap": d_overlap,
        "parts": parts, "across": across,
        **strides("q", q), **strides("k", k), **strides("v", v), **strides("d", d_h),
        "heads": z.heads, "s": z.s, "chunks": z.chunks, "x_tiles": x_tiles, "plane": z.plane,
        "QK": z.qk, "V": z.v, "L": z.L, "BT": tile.tokens, "BA": tile.inner, "BX": tile.width,
        "NORMALIZE": options.normalize, "BOUNDED": bounded, "EVEN_S": z.s % z.L == 0,
        "PRECISION": options.precision, "STAGES": tile.num_stages,
    }  # fmt: skip
    launches.append(
        Launch("query and key gradients", query_key_gradients_kernel,
               (2 * z.plane // tile.tokens * x_tiles,), arguments, tile.num_warps,
               tile.num_stages)
    )  # fmt: skip
    arguments = {
        "igate": i, "fgate": f, "first": first, "keep": out.keep, "parts": parts, "across": across,
        "d_igate": grads.di, "d_fgate": grads.df, **strides("i", i), **strides("f", f),
        "heads": z.heads, "s": z.s, "chunks": z.chunks, "x_tiles": x_tiles,
        "across_parts": tiles * x_tiles, "plane": z.plane, "L": z.L, "EXP_GATE": options.exp_gate,
        "BOUNDED": bounded, **cap_arguments(options),
    }  # fmt: skip
    launches.append(
        Launch("gate gradients", gate_gradients_kernel, (z.rows * z.chunks,), arguments, 4, 1)
    )  # fmt: skip
    return grads, launches
