"""The sLSTM on Triton: what the kernels of `kernels` are launched with, and in what order.

Weights take part in the products in the dtype of the pre-activations. Heads too large for one
program take one launch per step and pass. `graphs` replays these as graphs of the GPU where it can.
What is left is launched from Python. A graph of the caller can capture that too: nothing in between
touches the host.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from xlstm_kernels.common import triton_launch
from xlstm_kernels.common.device_limits import SMALL_SHARED
from xlstm_kernels.common.triton_launch import Launch, architecture, run_all
from xlstm_kernels.slstm.operator import Gradients, Kept, PartialState, Results, scan_operator
from xlstm_kernels.slstm.triton import graphs, kernels, persistent_plan

MOST = 1024
BATCH = 16  # rows of a program: the least that a tensor core's product takes
STEP = "slstm step"  # the name of a launch that does a single step


def unsupported_reason(
    like: Tensor, *, d: int, asked: bool, cell: str = "slstm", batch: int = 1, heads: int = 1
) -> str | None:
    """Why this backend cannot run such a call, with the remedy; None if it can.

    Any number of rows and heads will do.
    """
    reason = triton_launch.unsupported_reason(like, asked=asked)
    if reason is not None:
        return reason
    if cell != "slstm":
        return "it has the sLSTM with an exponential input gate only; use 'torch'"
    if d > MOST:
        return f"a head of {d} exceeds {MOST}; use more heads, or 'torch'"
    return None


class Tiles(NamedTuple):
    """How a pass is tiled: `width` columns and `inner` of the summed axis at a time.

    inner = 0 means resident weights (then width holds the whole head). `apart`: each tile of
    columns is a program of its own, and every step a launch.
    """

    width: int
    apart: bool
    inner: int
    num_warps: int
    num_stages: int


def tiles_for(target: str, d: int, dtype: torch.dtype) -> Tiles:
    """The table: `target` is "sm_90", "gfx942" and so on."""
    whole = max(16, triton.next_power_of_2(d))
    wide = dtype == torch.float32
    if target == "interpreter":  # where every operation costs the same, whatever its size
        most, streamed, apart = 64, Tiles(128, False, 128, 4, 1), Tiles(256, True, 256, 4, 1)
    elif target.startswith("gfx"):  # 64 KB of shared memory
        most = 32 if wide else 64
        streamed, apart = Tiles(64, False, 16 if wide else 32, 4, 1), Tiles(32, True, 32, 4, 2)
    elif wide:
        most, streamed, apart = 64, Tiles(64, False, 16, 8, 2), Tiles(32, True, 16, 4, 2)
    else:
        # Four matrices of 128 x 128 take 136 KB of shared memory. Of a step, no warp may have all
        # gates of a column: see `recurrent_sums`.
        most = 64 if target in SMALL_SHARED else 128
        streamed, apart = Tiles(64, False, 32, 8, 3), Tiles(32, True, 64, 8, 3)
    if whole <= most:
        return Tiles(whole, False, 0, 8 if whole > 64 or (wide and whole > 16) else 4, 1)
    return streamed if whole <= 256 else apart


def _plan(
    kernels_of, tiles: Tiles, shape, arguments: dict, target: str, last: int, begin: int
) -> Iterator[Launch]:
    """Launches of one pass over `last` steps: one, or one per step where tiles share a head.

    Single steps before number `begin` are left out.
    """
    batch, steps, heads, d = shape
    resident, streamed = kernels_of
    blocks = heads * triton.cdiv(batch, BATCH)
    sizes = {"batch": batch, "steps": steps, "heads": heads, "d": d}
    static = {
        "PRECISION": "tf32x3" if target.startswith("sm_") else "ieee",
        "BATCH": BATCH,
        "STAGES": tiles.num_stages,
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    if not tiles.inner:
        arguments = arguments | sizes | static | {"D": tiles.width}
        yield Launch("slstm resident", resident, (blocks,), arguments, **options)
        return
    arguments = arguments | sizes | static
    arguments |= {"WIDTH": tiles.width, "INNER": tiles.inner, "APART": tiles.apart}
    name, count, programs = "slstm streamed", last, blocks
    if tiles.apart:
        name, count, programs = STEP, 1, blocks * triton.cdiv(d, tiles.width)
    for first in range(begin, last, count):
        given = arguments | {"first": first, "last": first + count}
        yield Launch(name, streamed, (programs,), given, **options)


def plan_forward(
    preacts, weight, bias, starts, states, out, kept, sigmoid_forget, target, begin=0
) -> Iterator[Launch]:
    """Launches of the forward pass, without single steps before number `begin`.

    `states` (h, c, n, m) are the first and become the last; in the streamed form h has two parts,
    see `forward_streamed`.
    """
    batch, steps, _, heads, d = preacts.shape
    tiles = tiles_for(target, d, preacts.dtype)
    h, c, n, m = states
    arguments = {"preacts": preacts, "weight": weight, "bias": bias, "starts": starts, "out": out}
    arguments |= {"h_states": h} if tiles.inner else {"h_state": h}
    arguments |= {"c_state": c, "n_state": n, "m_state": m, "SIGMOID": sigmoid_forget, **kept}
    both = kernels.forward_resident, kernels.forward_streamed
    return _plan(both, tiles, (batch, steps, heads, d), arguments, target, steps, begin)


def plan_backward(
    d_out, weight, starts, kept, d_states, d_h_first, d_preacts, target, begin=0
) -> Iterator[Launch]:
    """Launches of the backward pass; `d_states` (h, c, n) are of the last state, become the first.

    Only a streamed pass writes `d_h_first`; it takes a step more. Single steps before number
    `begin`, counted from the end of the sequence, are left out.
    """
    batch, steps, _, heads, d = d_preacts.shape
    tiles = tiles_for(target, d, d_preacts.dtype)
    h, c, n = d_states
    arguments = {"d_out": d_out, "weight": weight, "starts": starts, **kept}
    arguments |= {"d_c_state": c, "d_n_state": n, "d_preacts": d_preacts}
    arguments |= {"d_h_last": h, "d_h_first": d_h_first} if tiles.inner else {"d_h_state": h}
    both = kernels.backward_resident, kernels.backward_streamed
    last = steps + 1 if tiles.inner else steps
    return _plan(both, tiles, (batch, steps, heads, d), arguments, target, last, begin)


KEPT = ("acts", "decays", "cs", "ns")

FORWARD = graphs.Pass(
    constant=("weight", "bias"),
    read=("preacts", "starts"),
    written=("out", *KEPT),
    carried=("h_states", "c_state", "n_state", "m_state"),
    same={},
    backwards=False,
    closing=0,
)

# The step before the first token gives d_h of the segment before, where its last step reads it.
BACKWARD = graphs.Pass(
    constant=("weight",),
    read=("d_out", "starts", *KEPT),
    written=("d_preacts",),
    carried=("d_h_last", "d_c_state", "d_n_state"),
    same={"d_h_first": "d_h_last"},
    backwards=True,
    closing=1,
)


def _run(plan: Callable[[int], Iterator[Launch]], roles: graphs.Pass, like: Tensor) -> None:
    """Do a pass: as graphs as far as these go, then launch by launch.

    Args:
        plan: The launches from a step on.
        roles: What their arguments are.
        like: A tensor on the device where they run.
    """
    first = next(plan(0))
    done = graphs.run_segments(first, roles) if first.name == STEP else 0
    run_all(plan(done), like)


def kept_buffers(preacts: Tensor) -> list[Tensor]:
    """Fresh tensors for what the backward pass needs, in the order of `KEPT`."""
    b, s, _, heads, d = preacts.shape
    wide = {"dtype": torch.float32}
    states = [preacts.new_empty(b, s, heads, d, **wide) for _ in range(3)]
    return [preacts.new_empty(b, s, 4, heads, d), *states]


def _state(x: Tensor | None, like: Tensor) -> Tensor:
    """A state part as a float32 tensor of its own; zeros for None."""
    b, _, _, heads, d = like.shape
    if x is None:
        return like.new_zeros(b, heads, d, dtype=torch.float32)
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _bytes(boundaries: Tensor | None) -> Tensor | None:
    return None if boundaries is None else boundaries.contiguous().view(torch.uint8)


def allocate(gate_preacts: Tensor, cell: str) -> Results:
    """Fresh tensors for the results. Saved is what `KEPT` names."""
    b, s, _, heads, d = gate_preacts.shape
    last = tuple(gate_preacts.new_empty(b, heads, d, dtype=torch.float32) for _ in range(4))
    return Results(gate_preacts.new_empty(b, s, heads, d), last, kept_buffers(gate_preacts))


def forward(
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    state: PartialState,
    boundaries: Tensor | None,
    sigmoid_forget: bool,
    cell: str,
    *,
    persistent: bool = False,
) -> Results:
    """The forward pass; see `slstm_scan`. `persistent` asks for that form."""
    preacts, steps = gate_preacts.contiguous(), gate_preacts.shape[1]
    weight = recurrent_weight.to(preacts.dtype).contiguous()
    target = architecture(preacts.device)
    h, c, n, m = (_state(x, preacts) for x in state)
    m.masked_fill_(n == 0, -torch.inf)
    group = persistent_plan.group_of(preacts) if persistent else None
    streamed = group is None and tiles_for(target, preacts.shape[-1], preacts.dtype).inner > 0
    if streamed:
        h = torch.stack([h, torch.empty_like(h)])
    out, kept = torch.empty_like(preacts[:, :, 0]), kept_buffers(preacts)
    given = (
        preacts, weight, bias.contiguous(), _bytes(boundaries), (h, c, n, m), out,
        dict(zip(KEPT, kept, strict=True)), sigmoid_forget, target,
    )  # fmt: skip
    if group is not None:
        run_all(persistent_plan.plan_forward(*given, group), preacts)
        return Results(out, (h, c, n, m), kept)
    _run(partial(plan_forward, *given), FORWARD, preacts)
    if streamed:
        h = h[steps % 2].clone()
    return Results(out, (h, c, n, m), kept)


def allocate_gradients(kept: Kept) -> Gradients:
    """Fresh tensors for the gradients."""
    acts = kept.saved[0]
    b, _, _, heads, d = acts.shape
    wide = {"dtype": torch.float32}
    d_weight = torch.empty_like(kept.recurrent_weight, dtype=acts.dtype)
    d_states = [acts.new_empty(b, heads, d, **wide) for _ in range(3)]
    return Gradients(
        torch.empty_like(acts), d_weight, acts.new_empty(4, heads, d, **wide), *d_states
    )


def backward(
    kept: Kept,
    d_out: Tensor | None,
    d_last: PartialState,
    sigmoid_forget: bool,
    cell: str,
    *,
    persistent: bool = False,
) -> Gradients:
    """The backward pass. The derivative of the forget gate is in what was saved."""
    boundaries, out, acts = kept.boundaries, kept.out, kept.saved[0]
    b, s, _, heads, d = acts.shape
    target = architecture(out.device)
    weight = kept.recurrent_weight.to(out.dtype).contiguous()
    d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
    d_states = [_state(x, acts) for x in d_last]
    d_h_first, d_preacts = torch.empty_like(d_states[0]), torch.empty_like(acts)
    saved = dict(zip(KEPT, kept.saved, strict=True))
    group = persistent_plan.group_of(acts) if persistent else None
    given = d_out, weight, _bytes(boundaries), saved, d_states
    if group is not None:
        run_all(persistent_plan.plan_backward(*given, d_preacts, target, group), out)
    else:
        plan = partial(plan_backward, *given, d_h_first, d_preacts, target)
        _run(plan, BACKWARD, out)
    if group is None and tiles_for(target, d, out.dtype).inner > 0:
        d_states[0] = d_h_first
    # The gradient of the recurrent weight is one batched product over all steps, gate by gate.
    h_prev = torch.empty_like(out)
    h_prev[:, 1:] = out[:, :-1]
    h_prev[:, 0] = 0 if kept.h_first is None else kept.h_first
    if boundaries is not None:
        h_prev.masked_fill_(boundaries[:, :, None, None], 0)
    left = h_prev.view(b * s, heads, d).permute(1, 2, 0)
    d_weight = torch.empty_like(weight)
    for gate in range(4):
        right = d_preacts.view(b * s, 4, heads, d)[:, gate].transpose(0, 1)
        d_weight[gate] = torch.bmm(left, right)
    d_bias = d_preacts.sum((0, 1), dtype=torch.float32)
    return Gradients(d_preacts, d_weight, d_bias, *d_states)


scan_forward = scan_operator(
    "slstm_scan_triton",
    forward=forward,
    allocate=allocate,
    backward=backward,
    allocate_gradients=allocate_gradients,
    keeps_output=True,
)
