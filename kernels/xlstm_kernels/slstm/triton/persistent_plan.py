"""The persistent form of the sLSTM: whether a call fits a device, and its launches.

It is off until a GPU has run it. `XLSTM_SLSTM_PERSISTENT=1` asks for it, and calls that do not fit
take the other forms. The programs of `persistent` wait for each other, so all of them must run at
the same time: there is at most one for each processor.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from xlstm_kernels.common.launch_graph import Device, device_of
from xlstm_kernels.common.triton_launch import Launch
from xlstm_kernels.slstm.triton import persistent

WIDTHS = (32, 16)  # columns of a program: of the gates of 8 columns each warp has one product


class Group(NamedTuple):
    """How a call is shared out.

    Attributes:
        width: Columns of a program.
        tiles: Programs that share a head and a block of rows, and meet at every step.
        programs: Of all groups.
        num_warps: Of a program.
    """

    width: int
    tiles: int
    programs: int
    num_warps: int


def asked_for() -> bool:
    """Whether the environment asks for this form."""
    return os.environ.get("XLSTM_SLSTM_PERSISTENT") == "1"


def plan_group(
    batch: int, heads: int, d: int, dtype: torch.dtype, device: Device, rows: int
) -> Group | None:
    """The widest programs that fit; None if none do.

    R takes 8 heads d^2 bytes for each block of rows, of which a program holds 8 D width, with D the
    power of two that is not below d. With 4 rows D of what a step exchanges this is at most the
    shared memory of a program. There are heads ceil(d / width) ceil(batch / rows) programs, at
    most one for each processor.

    Args:
        batch: Rows of the call.
        heads: Its heads.
        d: Width of a head.
        dtype: Of the pre-activations and of the products.
        device: What it has.
        rows: Of one program.
    """
    if dtype != torch.bfloat16:  # twice the bytes, and products of three parts
        return None
    for width in WIDTHS:
        tiles = triton.cdiv(d, width)
        programs = heads * tiles * triton.cdiv(batch, rows)
        shared = triton.next_power_of_2(d) * (8 * width + 4 * rows)
        if shared <= device.shared and programs <= device.processors:
            return Group(width, tiles, programs, width // 2)
    return None


def group_for(preacts: Tensor, rows: int) -> Group | None:
    """The group of a call on its device, if this form is asked for and the call fits."""
    if not asked_for():
        return None
    batch, _, _, heads, d = preacts.shape
    return plan_group(batch, heads, d, preacts.dtype, device_of(preacts.device), rows)


def _launches(kernel, group: Group, arguments: dict, like: Tensor, rows: int, target: str):
    """One launch of all steps; in the interpreter, which cannot wait, one for each step."""
    batch, steps, _, heads, d = like.shape
    arguments = arguments | {"batch": batch, "steps": steps, "heads": heads, "d": d}
    arguments |= {"PRECISION": "ieee", "BATCH": rows, "WIDTH": group.width}
    arguments["D"] = max(16, triton.next_power_of_2(d))
    count = 1 if target == "interpreter" else steps
    for first in range(0, steps, count):
        yield Launch(
            "slstm persistent",
            kernel,
            (group.programs,),
            arguments | {"first": first, "last": first + count},
            group.num_warps,
            1,
            cooperative=True,
        )


def plan_forward(
    preacts, weight, bias, starts, states, out, kept, sigmoid_forget, target, group, rows
) -> Iterator[Launch]:
    """Launches of the forward pass; `states` (h, c, n, m) are the first and become the last."""
    h, c, n, m = states
    arguments = {"preacts": preacts, "weight": weight, "bias": bias, "starts": starts, "out": out}
    arguments |= {"h_parts": h.to(preacts.dtype).expand(2, *h.shape).contiguous(), "h_state": h}
    arguments |= {"c_state": c, "n_state": n, "m_state": m, "SIGMOID": sigmoid_forget, **kept}
    arguments["arrived"] = _counters(preacts, group)
    return _launches(persistent.forward_persistent, group, arguments, preacts, rows, target)


def plan_backward(
    d_out, weight, starts, kept, d_states, d_preacts, target, group, rows
) -> Iterator[Launch]:
    """Launches of the backward pass; `d_states` (h, c, n) of the last state become the first's."""
    h, c, n = d_states
    steps, d = d_preacts.shape[1], d_preacts.shape[-1]
    whole = max(16, triton.next_power_of_2(d))
    parts = h.new_empty(2, group.programs, rows, whole, dtype=torch.float32)
    arguments = {"d_out": d_out, "weight": weight, "starts": starts, **kept, "parts": parts}
    arguments |= {"d_h_state": h, "d_c_state": c, "d_n_state": n, "d_preacts": d_preacts}
    arguments |= {"arrived": _counters(d_preacts, group)}
    arguments |= {"TILES": triton.next_power_of_2(group.tiles)}
    kernel = persistent.backward_persistent
    for launch in _launches(kernel, group, arguments, d_preacts, rows, target):
        yield launch
    arguments = launch.arguments | {"first": steps, "last": steps}
    yield Launch(
        "slstm first state", kernel, launch.grid, arguments, launch.num_warps, launch.num_stages
    )


def _counters(like: Tensor, group: Group) -> Tensor:
    return like.new_zeros(group.programs // group.tiles, dtype=torch.int32)
