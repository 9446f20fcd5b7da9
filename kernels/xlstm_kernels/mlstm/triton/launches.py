"""Launches of the mLSTM on Triton, forward and backward, and the tensors they fill.

Forward: gates, states, outputs. Backward: gradients of the normalizer and, in wide heads, of all
pairs of a chunk, of states, of v, of q and k, of gates. A pass over states is two launches where
batch and heads alone do not fill a GPU. The passes are planned as lists of `Launch`, on any device:
`benchmarks/kernel_variants` plans on the meta device. Equations: `outputs`, `gradients`; decays and
precision: `gates`. Products of bfloat16 accumulate in float32; float32 products are "tf32x3"
(nearly float32) on NVIDIA and exact on AMD.

Checked without a GPU only, in the interpreter and by ahead-of-time compilation: no time is known.
Chunks and rows of a batch are as many programs as there are; a state pass is sequential in chunks.
"""

import math

import torch
from torch import Tensor

from xlstm_kernels.common.triton_launch import Launch
from xlstm_kernels.mlstm.arguments import Gradients, Inputs, State
from xlstm_kernels.mlstm.triton.buffers import (
    ChunkStates,
    Options,
    Saved,
    Sizes,
    allocate_forward,
    allocate_gradients,
    readable,
    sizes_of,
    strides,
)
from xlstm_kernels.mlstm.triton.gates import (
    GATE_PLANES,
    GRADIENT_PLANES,
    gate_gradients_kernel,
    gates_kernel,
)
from xlstm_kernels.mlstm.triton.gradients import query_key_gradients_kernel, target_gradients_kernel
from xlstm_kernels.mlstm.triton.outputs import outputs_kernel
from xlstm_kernels.mlstm.triton.states import LOCAL, RESUME, WHOLE, states_kernel
from xlstm_kernels.mlstm.triton.tiles import PROGRAMS, Tile, power_of_two, segments

FEW_TILES = 4  # of columns of dq: so many programs that need dS do not compute it each
LONGEST_PREFIX = 512  # gates that the gate pass reduces at a time; more take spilled registers


def gates_launch(
    inputs: Inputs,
    m0: Tensor | None,
    boundaries: Tensor | None,
    last_m: Tensor | None,
    saved: Saved,
    z: Sizes,
    options: Options,
) -> Launch:
    """The gate pass, from the m of the initial state."""
    per_program = min(max(z.rows * z.chunks // PROGRAMS, 1), z.chunks)
    programs = -(-z.chunks // per_program)
    scale = z.qk**-0.5
    log_scale = math.log(scale)
    bounded = boundaries is not None
    arguments = {"igate": inputs.igate, "fgate": inputs.fgate, "m0": m0, "starts": boundaries}
    arguments |= {"gates": saved.gates, "g_bar": saved.g_bar, "first": saved.first}
    arguments |= {"last_m": last_m, **strides(i=inputs.igate, f=inputs.fgate)}
    arguments |= {"stride_sb": boundaries.stride(0) if bounded else 0}
    arguments |= {"stride_ss": boundaries.stride(1) if bounded else 0}
    arguments |= z.arguments() | {"chunks_per_program": per_program, "programs": programs}
    arguments |= {"log_scale": log_scale, "scale": scale, **options.cap_arguments()}
    arguments |= {"PREFIX": max(min(power_of_two(z.s), LONGEST_PREFIX), 16)}
    arguments |= {"EXP_GATE": options.exp_gate, "CARRIED": m0 is not None, "BOUNDED": bounded}
    return Launch("gates", gates_kernel, (z.rows * programs,), arguments, 4, 1)


def states_launches(
    a: Tensor,
    b: Tensor,
    states: ChunkStates,
    first: tuple[Tensor | None, Tensor | None],
    last: tuple[Tensor | None, Tensor | None],
    saved: Saved,
    z: Sizes,
    options: Options,
    *,
    backward: bool,
    d_nq: Tensor | None = None,
) -> list[Launch]:
    """One pass over the states, or over their gradients.

    Args:
        a: k, or q backward.
        b: v, or the gradient of h.
        states: Where the state before each chunk goes, or the gradient of the state after it.
        first: C and n that the pass starts from, None for zeros.
        last: Where C and n at the end of the pass go, None where they are not asked for.
        saved: What the gate pass left and, backward, the forward pass.
        z: Sizes of the call.
        options: Options of the call.
        backward: Whether this is the pass over gradients.
        d_nq: Gradient of n.q; backward and with normalisation only.
    """
    tile: Tile = options.tiles.states
    q_tiles, v_tiles = -(-z.qk // tile.inner), -(-z.v // tile.width)
    count = segments(z.rows * q_tiles * v_tiles, z.chunks)
    per_segment = -(-z.chunks // count)
    count = -(-z.chunks // per_segment)
    local_c = local_n = local_g = None  # what each segment but the last writes, and its decay
    if count > 1:
        shape, new = (z.rows, count - 1), {"dtype": torch.float32, "device": a.device}
        local_c = torch.empty(*shape, z.qk, z.v, **new)
        local_n, local_g = torch.empty(*shape, z.qk, **new), torch.empty(*shape, **new)
    shared = {"a": a, "b": b, "gates": saved.gates, "g_bar": saved.g_bar, "d_nq": d_nq}
    shared |= {"states": states.C, "n_states": states.n, **strides(a=a, b=b), **z.arguments()}
    shared |= {"segment_c": local_c, "segment_n": local_n, "segment_g": local_g}
    shared |= {"chunks_per_segment": per_segment, "q_tiles": q_tiles, "v_tiles": v_tiles}
    shared |= {"QK": z.qk, "V": z.v, "BQ": tile.inner, "BV": tile.width, "BL": tile.tokens}
    shared |= {"BACKWARD": backward, "NORMALIZE": options.normalize, "EVEN_S": z.s % z.L == 0}
    shared |= {"PRECISION": options.precision, "STAGES": tile.num_stages}
    ends = {"first_c": first[0], "first_n": first[1], "last_c": last[0], "last_n": last[1]}
    name = "state gradients" if backward else "states"

    def launch(suffix, phase, segments_run, ends):
        arguments = shared | ends | {"segments": segments_run, "PHASE": phase.value}
        arguments |= {"STORE_LAST": ends["last_c"] is not None}
        grid = (z.rows * q_tiles * v_tiles * segments_run,)
        return Launch(
            name + suffix, states_kernel, grid, arguments, tile.num_warps, tile.num_stages
        )

    if count == 1:
        return [launch("", WHOLE, 1, ends)]
    local = launch(" of segments", LOCAL, count - 1, dict.fromkeys(ends))
    return [local, launch(" resumed", RESUME, count, ends)]


def outputs_launch(
    a: Tensor,
    b: Tensor,
    x: Tensor,
    out: Tensor,
    states: ChunkStates,
    saved: Saved,
    z: Sizes,
    options: Options,
    *,
    backward: bool,
) -> Launch:
    """`h` from (q, k, v) and states, or backward dv from (k, q, d_h) and gradients of states."""
    tile: Tile = options.tiles.values if backward else options.tiles.outputs
    x_tiles = -(-z.v // tile.width)
    normalize, bounded = options.normalize, saved.bounded
    arguments = {"a": a, "b": b, "x": x, "out": out, "states": states.C, "n_states": states.n}
    arguments |= {"gates": saved.gates, "first": saved.first if bounded else None}
    arguments |= {**strides(a=a, b=b, x=x, o=out), **z.arguments(), "x_tiles": x_tiles}
    arguments |= {"eps": options.eps, "QK": z.qk, "V": z.v, "BT": tile.tokens, "BA": tile.inner}
    arguments |= {"BX": tile.width, "BACKWARD": backward, "NORMALIZE": normalize}
    arguments |= {"BOUNDED": bounded, "EVEN_S": z.s % z.L == 0}
    arguments |= {"PRECISION": options.precision, "STAGES": tile.num_stages}
    name = "value gradients" if backward else "outputs"
    grid = (z.plane // tile.tokens * x_tiles,)
    return Launch(name, outputs_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def check_planes(z: Sizes, options: Options) -> None:
    """Require 32 bits to count what the gates leave: the kernels count so inside a row's tensors.

    Raises:
        ValueError: There are too many tokens of all heads and rows.
    """
    x_tiles = -(-z.qk // options.tiles.keys.width)
    most = (2**31 - 1) // max(GATE_PLANES, GRADIENT_PLANES * x_tiles)
    if z.plane > most:
        raise ValueError(
            f"{z.b} rows of {z.heads} heads and {z.padded:,} tokens are {z.plane:,} gates, and the "
            f"Triton kernels count at most {most:,}; use fewer rows at a time, or 'torch'"
        )


def plan_forward(
    inputs: Inputs,
    state: State | tuple[None, None, None],
    boundaries: Tensor | None,
    options: Options,
    need_last: bool,
) -> tuple[Tensor, State, Saved, list[Launch]]:
    """Results of the forward pass as of `allocate_forward`, not yet computed, and its launches."""
    z = sizes_of(inputs.q, inputs.v, options.chunk_size)
    check_planes(z, options)
    q, k, v = (readable(x) for x in inputs[:3])
    C, n, m = state
    h, last, saved = allocate_forward(
        q,
        z,
        bf16_states=options.bf16_states,
        bounded=boundaries is not None,
        need_last=need_last,
    )
    states = ChunkStates(saved.C_before, saved.n_before)
    ends = (C, n), last[:2]
    launches = [
        gates_launch(inputs, m, boundaries, last[2], saved, z, options),
        *states_launches(k, v, states, *ends, saved, z, options, backward=False),
        outputs_launch(q, k, v, h, states, saved, z, options, backward=False),
    ]
    return h, last, saved, launches


def targets_launch(
    v: Tensor,
    h: Tensor,
    d_h: Tensor,
    d_nq: Tensor | None,
    d_pairs: Tensor | None,
    saved: Saved,
    z: Sizes,
    options: Options,
) -> Launch:
    """The gradients of n.q, and of the pairs of each chunk where there is a tensor for them."""
    tile: Tile = options.tiles.keys
    normalize, bounded = options.normalize, saved.bounded
    arguments = {"h": h, "v": None if d_pairs is None else v, "d_h": d_h, "gates": saved.gates}
    arguments |= {"first": saved.first if bounded else None, "d_pairs": d_pairs}
    arguments |= {"d_nq": d_nq, **strides(v=v, d=d_h), **z.arguments()}
    arguments |= {"V": z.v, "BT": tile.tokens, "BA": tile.inner, "NORMALIZE": normalize}
    arguments |= {"BOUNDED": bounded, "EVEN_S": z.s % z.L == 0}
    arguments |= {"PRECISION": options.precision, "STAGES": tile.num_stages}
    name, grid = "target gradients", (z.plane // tile.tokens,)
    return Launch(name, target_gradients_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def plan_backward(
    inputs: Inputs,
    h: Tensor,
    d_h: Tensor,
    d_last: tuple[Tensor | None, Tensor | None],
    saved: Saved,
    options: Options,
    need_state: bool,
) -> tuple[Gradients, list[Launch]]:
    """Gradients (not yet computed) and launches of the backward pass.

    `d_last` are the gradients of C and n of the last state, None for zeros. `need_state` says
    whether the gradients of the initial state are asked for.
    """
    z = sizes_of(inputs.q, inputs.v, options.chunk_size)
    q, k, v, d_h = (readable(x) for x in (*inputs[:3], d_h))
    grads = allocate_gradients(inputs, need_state)
    tile: Tile = options.tiles.keys
    x_tiles, tiles = -(-z.qk // tile.width), z.L // tile.tokens
    normalize, bounded = options.normalize, saved.bounded
    first = saved.first if bounded else None

    def new(*shape):
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    states = ChunkStates(saved.C_before, saved.n_before)
    d_states = ChunkStates(*(torch.empty_like(x) for x in states))
    parts = new(GRADIENT_PLANES, x_tiles, z.rows, z.padded)
    across = new(z.rows, z.chunks, tiles * x_tiles)
    d_nq = new(z.rows, z.padded) if normalize else None
    d_pairs = None
    if x_tiles >= FEW_TILES:
        d_pairs = torch.empty(z.rows, z.padded, z.L, dtype=q.dtype, device=q.device)
    launches = []
    if normalize or d_pairs is not None:
        launches.append(targets_launch(v, h, d_h, d_nq, d_pairs, saved, z, options))
    ends = d_last, (grads.dC, grads.dn)
    launches += states_launches(
        q, d_h, d_states, *ends, saved, z, options, backward=True, d_nq=d_nq
    )
    launches.append(outputs_launch(k, q, d_h, grads.dv, d_states, saved, z, options, backward=True))

    arguments = {"q": q, "k": k, "v": v, "d_h": d_h, "dq": grads.dq, "dk": grads.dk}
    arguments |= {"states": states.C, "n_states": states.n}
    arguments |= {"d_states": d_states.C, "d_n_states": d_states.n, "gates": saved.gates}
    arguments |= {"first": first, "d_nq": d_nq, "d_pairs": d_pairs}
    arguments |= {"parts": parts, "across": across}
    arguments |= strides(q=q, k=k, v=v, d=d_h, o=grads.dq)
    arguments |= {**z.arguments(), "x_tiles": x_tiles, "QK": z.qk, "V": z.v}
    arguments |= {"BT": tile.tokens, "BA": tile.inner, "BX": tile.width, "NORMALIZE": normalize}
    arguments |= {"BOUNDED": bounded, "EVEN_S": z.s % z.L == 0}
    arguments |= {"PRECISION": options.precision, "STAGES": tile.num_stages}
    name, grid = "query and key gradients", (2 * z.plane // tile.tokens * x_tiles,)
    launches.append(
        Launch(name, query_key_gradients_kernel, grid, arguments, tile.num_warps, tile.num_stages)
    )

    igate, fgate = inputs.igate, inputs.fgate
    arguments = {"igate": igate, "fgate": fgate, "first": first, "g_bar": saved.g_bar}
    arguments |= {"parts": parts, "across": across}
    arguments |= {"d_igate": grads.d_igate, "d_fgate": grads.d_fgate}
    arguments |= {**strides(i=igate, f=fgate), **z.arguments(), "x_tiles": x_tiles}
    arguments |= {"across_parts": tiles * x_tiles, "EXP_GATE": options.exp_gate}
    arguments |= {"BOUNDED": bounded, **options.cap_arguments()}
    grid = (z.rows * z.chunks,)
    launches.append(Launch("gate gradients", gate_gradients_kernel, grid, arguments, 4, 1))
    return grads, launches
