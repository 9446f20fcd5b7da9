"""The sLSTM's launches of single steps, replayed as graphs of the GPU.

A graph holds the steps of one segment of the sequence and works on buffers of its own. The walk
over a sequence copies a segment's inputs there, replays, and copies its outputs away. States stay
in the buffers from one replay to the next. So the buffers do not grow with the sequence, one graph
serves every length, all layers of a model share it, and no result lies in memory that a later call
writes.

Steps beyond the last whole segment are left to the caller, who launches them one by one.
"""

from collections.abc import Hashable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.common import launch_graph
from xlstm_kernels.common.launch_graph import GraphCache, LaunchGraph
from xlstm_kernels.common.triton_launch import Launch

SEGMENT = 128
"""Steps of one graph. Even, so that a segment leaves h where `forward_streamed` starts. At 2,048
channels and 16 rows in bf16 the buffers of both passes take 0.27 GB; a replay takes the GPU more
than half a millisecond, and the host a fraction of that."""

MOST_GRAPHS = 8
"""Graphs that are kept: both passes of a model at four shapes."""

GRAPHS: GraphCache["Segment"] = GraphCache(MOST_GRAPHS)


class Pass(NamedTuple):
    """What the arguments of a pass's launches are, by name.

    Attributes:
        constant: Tensors that no step changes.
        read: Tensors [batch, steps, ...] that a step reads.
        written: Tensors [batch, steps, ...] that a step writes.
        carried: Tensors that each step reads and the next one finds changed.
        same: Names of arguments that lie in the buffer of another one.
        backwards: Whether the steps go from the end to the start.
        closing: Launches after the last step that bring what is carried over the segment's border.
    """

    constant: tuple[str, ...]
    read: tuple[str, ...]
    written: tuple[str, ...]
    carried: tuple[str, ...]
    same: dict[str, str]
    backwards: bool
    closing: int


def buffers_for(launch: Launch, roles: Pass, steps: int) -> dict[str, Tensor]:
    """Fresh buffers for `steps` steps of a pass, by the names of its arguments.

    They are zeros, so that the launch before the capture computes with numbers.

    Args:
        launch: Any single step of the pass, planned on the tensors of a call.
        roles: What its arguments are.
        steps: Steps of the graph.
    """
    known, by_time = launch.arguments, (*roles.read, *roles.written)
    return {
        name: known[name].new_zeros(known[name].shape[0], steps, *known[name].shape[2:])
        if name in by_time
        else known[name].new_zeros(known[name].shape)
        for name in (*roles.constant, *by_time, *roles.carried)
        if known[name] is not None
    }


class Segment:
    """A captured graph of SEGMENT steps and the buffers that it works on.

    Args:
        launch: Any single step of the pass, planned on the tensors of a call.
        roles: What its arguments are.
        steps: Steps of the graph.
    """

    def __init__(self, launch: Launch, roles: Pass, steps: int) -> None:
        self.roles, self.steps = roles, steps
        known = launch.arguments
        # A call under torch.inference_mode may be the first one, and the buffers outlive it.
        with torch.inference_mode(False):
            self.buffers = buffers_for(launch, roles, steps)
        arguments = known | self.buffers | {"steps": steps}
        arguments |= {name: self.buffers[other] for name, other in roles.same.items()}
        # A graph would read and write the tensors of this one call for ever.
        foreign = [n for n, x in arguments.items() if isinstance(x, Tensor) and x is known[n]]
        assert not foreign, f"no role is known of {foreign}"
        launches = [
            replace(launch, arguments=arguments | {"first": step, "last": step + 1})
            for step in range(steps + roles.closing)
        ]
        device = self.buffers[roles.carried[0]].device
        self.graph = LaunchGraph(launches, device)

    def walk(self, tensors: dict[str, Tensor], segments: int) -> None:
        """Do `segments` segments of a call, and leave outputs and states in its tensors."""
        kept = [*self.roles.constant, *self.roles.carried]
        for name in kept:
            self.buffers[name].copy_(tensors[name])
        read = [name for name in self.roles.read if name in self.buffers]
        steps = tensors[self.roles.written[0]].shape[1]
        for number in range(segments):
            start = number * self.steps
            if self.roles.backwards:
                start = steps - start - self.steps
            part = slice(start, start + self.steps)
            for name in read:
                self.buffers[name].copy_(tensors[name][:, part])
            self.graph.replay()
            for name in self.roles.written:
                tensors[name][:, part].copy_(self.buffers[name])
        for name in self.roles.carried:
            tensors[name].copy_(self.buffers[name])

    def close(self) -> None:
        """Free the graph, then its buffers."""
        self.graph.close()
        self.buffers.clear()


def key_of(launch: Launch, roles: Pass) -> Hashable:
    """What two calls must have in common to share a graph: all but values and the length."""
    varying = ("steps", "first", "last", *roles.same)
    facts = []
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            by_time = name in (*roles.read, *roles.written)
            shape = (value.shape[0], *value.shape[2:]) if by_time else tuple(value.shape)
            value = (value.dtype, shape)
        if name not in varying:
            facts.append((name, value))
    return launch.kernel, launch.grid, launch.num_warps, launch.num_stages, tuple(facts)


def run_segments(launch: Launch, roles: Pass) -> int:
    """Do as many steps of a pass as graphs can, in the pass's order; the number of these steps.

    It is 0 where no graph can be captured: on other devices, inside a capture, and for sequences
    shorter than a segment.

    Args:
        launch: The pass's first step, as planned.
        roles: What its arguments are.

    Raises:
        RuntimeError: A capture failed; see `LaunchGraph`.
    """
    tensors = launch.arguments
    like, steps = tensors[roles.written[0]], tensors["steps"]
    segments = steps // SEGMENT
    if not segments or not launch_graph.can_capture(like.device):
        return 0
    key = key_of(launch, roles), SEGMENT, like.device, launch_graph.current_stream(like.device)
    with GRAPHS.lock, torch.no_grad():
        GRAPHS.get(key, lambda: Segment(launch, roles, SEGMENT)).walk(tensors, segments)
    return segments * SEGMENT
