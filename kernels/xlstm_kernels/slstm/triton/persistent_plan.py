"""The launches of the persistent form of the sLSTM."""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from xlstm_kernels.common.launch_graph import device_of
from xlstm_kernels.common.triton_launch import Launch
from xlstm_kernels.slstm.triton import persistent
from xlstm_kernels.slstm.triton.persistent_group import ROWS, Group, plan_group


def group_of(preacts: Tensor) -> Group:
    """The group of a call on its device, which it fits."""
    batch, _, _, heads, d = preacts.shape
    group = plan_group(batch, heads, d, device_of(preacts.device))
    assert group is not None, "chosen for a call that does not fit"
    return group


def _launches(kernel, group: Group, arguments: dict, like: Tensor, target: str):
    """One launch of all steps; in the interpreter, which cannot wait, one for each step."""
    batch, steps, _, heads, d = like.shape
    arguments = arguments | {"batch": batch, "steps": steps, "heads": heads, "d": d}
    arguments |= {"PRECISION": "ieee", "BATCH": ROWS, "WIDTH": group.width}
    arguments["D"] = max(32, triton.next_power_of_2(d))
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
    preacts, weight, bias, starts, states, out, kept, sigmoid_forget, target, group
) -> Iterator[Launch]:
    """Launches of the forward pass; `states` (h, c, n, m) are the first and become the last."""
    h, c, n, m = states
    arguments = {"preacts": preacts, "weight": weight, "bias": bias, "starts": starts, "out": out}
    arguments |= {"h_parts": h.to(preacts.dtype).expand(2, *h.shape).contiguous(), "h_state": h}
    arguments |= {"c_state": c, "n_state": n, "m_state": m, "SIGMOID": sigmoid_forget, **kept}
    arguments["arrived"] = _counters(preacts, group)
    return _launches(persistent.forward_persistent, group, arguments, preacts, target)


def plan_backward(
    d_out, weight, starts, kept, d_states, d_preacts, target, group
) -> Iterator[Launch]:
    """Launches of the backward pass; `d_states` (h, c, n) of the last state become the first's."""
    h, c, n = d_states
    steps, d = d_preacts.shape[1], d_preacts.shape[-1]
    whole = max(32, triton.next_power_of_2(d))
    parts = h.new_empty(2, group.programs, ROWS, whole, dtype=torch.float32)
    arguments = {"d_out": d_out, "weight": weight, "starts": starts, **kept, "parts": parts}
    arguments |= {"d_h_state": h, "d_c_state": c, "d_n_state": n, "d_preacts": d_preacts}
    arguments |= {"arrived": _counters(d_preacts, group)}
    arguments |= {"TILES": triton.next_power_of_2(group.tiles)}
    kernel = persistent.backward_persistent
    for launch in _launches(kernel, group, arguments, d_preacts, target):
        yield launch
    arguments = launch.arguments | {"first": steps, "last": steps}
    yield Launch(
        "slstm first state", kernel, launch.grid, arguments, launch.num_warps, launch.num_stages
    )


def _counters(like: Tensor, group: Group) -> Tensor:
    return like.new_zeros(group.programs // group.tiles, dtype=torch.int32)
