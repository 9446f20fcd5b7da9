"""A device that does not exist and the other ranks that do not either.

Tensors are torch's fake ones: they have a shape, a type and a device, and no data, so any size fits
and nothing is computed. Process groups are torch's fake ones: one process plays one rank of many.
Every operator that the real engine asks for passes through here, and what matters of it is written
down.

The device is one of torch's slots for devices that others add, so it is neither the CPU nor a GPU.
Operations that mix it with host tensors fail as they would on a GPU.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PythonCallbackWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from pretrain import layout as layouts
from pretrain.rehearsal.memory import GRAPHS, MESSAGES, OTHER, STATES, MemoryMeter
from pretrain.rehearsal.record import HostWait, Message, RankRecord, caller_stack
from xlstm_mcore.megatron import cpu_runtime

NAME = "rehearsed"
# c10d operator -> what users call it. The others keep their name.
_OPERATIONS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce coalesced",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather coalesced",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter coalesced",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "recv_": "receive",
}
_ATEN = torch.ops.aten
# Operators that only look at a tensor, or that only reserve memory.
_NO_WORK = ("aten::detach", "aten::empty", "aten::lift_fresh", "aten::new_empty")


@functools.cache
def device() -> torch.device:
    """The device that does not exist; made at the first call, for the life of the process.

    It must be made before the first backward pass, when torch counts the devices that there are.
    """
    _setup_privateuseone_for_python_backend(NAME)
    module = getattr(torch, NAME)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    return torch.device(NAME, 0)


class RehearsalMode(FakeTensorMode):
    """Tensors without data whose operators are written down.

    Args:
        record: what is seen goes here.

    Attributes:
        meter: counts the memory of the device.
        phase: part of the rehearsal that what follows belongs to.
    """

    # Tensors that come from numbers are made on the host and then moved, as on a GPU.
    avoid_device_init = property(lambda self: True)

    def __init__(self, record: RankRecord) -> None:
        super().__init__()
        self.record, self.phase = record, "build"
        self.meter = MemoryMeter(NAME)
        self._graphs: set[tuple] = set()
        self._batches = 0
        self._batch: int | None = None
        self._running: dict[int, None] = {}  # messages whose end nobody has waited for

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run one operator on tensors without data."""
        kwargs = kwargs or {}
        name = func._schema.name
        if func is _ATEN._local_scalar_dense.default:
            value = args[0]
            if value.device.type == NAME:
                self.wait("the value of a tensor")
            elif value.constant is not None:
                return super().__torch_dispatch__(func, types, args, kwargs)
            return 0.0 if value.is_floating_point() else False if value.dtype == torch.bool else 0
        if func is _ATEN.nonzero.default:
            if args[0].device.type == NAME:
                self.wait("where a tensor is not zero")
            return args[0].new_zeros((1, args[0].dim()), dtype=torch.int64)
        if func is _ATEN.equal.default:  # as if nothing were wrong with any machine
            self.wait("whether tensors are equal")
            return True
        if func is _ATEN._pin_memory.default:
            return args[0].detach()
        if func is _ATEN.addmm.dtype_out:  # one kernel, which torch describes by several operators
            self._see(func, name, args, kwargs, kwargs["out"])
            return kwargs["out"]
        if not name.startswith("c10d::"):
            result = super().__torch_dispatch__(func, types, args, kwargs)
            self._see(func, name, args, kwargs, result)
            return result
        work = self._work(self._message(name.removeprefix("c10d::"), args))
        if "coalesced" in name:  # has no form for tensors without data
            return work
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._see(func, name, args, kwargs, result)
        return tree_map(lambda x: work if isinstance(x, torch.ScriptObject) else x, result)

    def _see(self, func: Any, name: str, args: tuple, kwargs: dict, result: Any) -> None:
        """Count memory and work, and notice copies that the host waits for."""
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        on_device = False
        for number, tensor in enumerate(outputs):
            if tensor.device.type != NAME:
                continue
            on_device = True
            # A cell returns its output first, and then the states it keeps.
            states = name.startswith("xlstm_kernels::") and number > 0 and tensor.dim() > 3
            self.meter.see(tensor, STATES if states else None)
        if name.startswith("xlstm_kernels::slstm_scan_triton"):
            self._see_graph(name.endswith("_backward"), args)
        if on_device and not func.is_view and not name.startswith(_NO_WORK):
            operators = self.record.operators
            operators[self.phase] = operators.get(self.phase, 0) + 1
        if func is _ATEN._to_copy.default:
            source, target, waits = args[0], outputs[0], not kwargs.get("non_blocking", False)
        elif func is _ATEN.copy_.default:
            target, source, *rest = args
            waits = not (rest[0] if rest else kwargs.get("non_blocking", False))
        else:
            return
        if waits and source.device.type == NAME and target.device.type == "cpu":
            self.wait("a copy of a tensor in host memory")

    def _see_graph(self, backward: bool, args: tuple) -> None:
        """Count the buffers of the graph that a GPU would replay for an operator of the sLSTM."""
        from xlstm_kernels.slstm.triton.graph_memory import graph_bytes

        gates, starts = (args[4][0], args[2]) if backward else (args[0], args[7])
        batch, steps, _, heads, d = gates.shape
        facts = {"boundaries": starts is not None, "backward": backward}
        size = graph_bytes(batch, steps, heads, d, gates.dtype, **facts)
        key = batch, heads, d, gates.dtype, *facts.values()
        if size and key not in self._graphs:
            self._graphs.add(key)
            self.meter.reserve(size, GRAPHS)

    def wait(self, what: str) -> None:
        """Write down that the host waits for the device."""
        wait = HostWait(self.phase, what, caller_stack())
        # A list of values is read value by value here, and in one copy on a real device.
        if not self.record.waits or self.record.waits[-1] != wait:
            self.record.waits.append(wait)

    def synchronize(self, _device: Any = None) -> None:
        """The host waits until the device has nothing left to do."""
        self.record.waits.append(HostWait(self.phase, "all streams", caller_stack()))
        for number in tuple(self._running):
            self._end(number)

    def _message(self, name: str, args: tuple) -> int:
        """Write down a message that starts by itself, and give its number."""
        group = next(found for x in args if (found := _as_group(x)) is not None)
        sizes = {0: 0}
        tensors: list[Tensor] = []
        for number, argument in enumerate(args):
            found = [x for x in tree_leaves(argument) if isinstance(x, Tensor)]
            sizes[number] = sum(x.numel() * x.element_size() for x in found)
            tensors += found
        operation = _OPERATIONS.get(name, name.strip("_"))
        members = tuple(dist.get_process_group_ranks(group))
        numbers = [x for x in args if isinstance(x, int) and not isinstance(x, bool)]
        peer, detail = None, ""
        if operation in ("send", "receive"):
            peer = members[numbers[0]]
        elif operation in ("broadcast", "reduce", "gather", "scatter"):
            detail = f"root {members[numbers[0]]}"
        if operation in ("gather", "scatter"):  # the root alone has the whole
            sizes = {0: len(members) * min(size for size in sizes.values() if size)}
        if operation == "receive":
            self.meter.claim(tensors[0], MESSAGES, only=OTHER)
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        return self._start(operation, group, dtype, max(sizes.values()), peer, detail)

    def write(
        self,
        operation: str,
        group: dist.ProcessGroup,
        dtype: str = "",
        size: int = 0,
        detail: str = "",
    ) -> None:
        """Write down a message whose end is waited for; the arguments are those of `Message`."""
        self._end(self._start(operation, group, dtype, size, None, detail))

    def _start(
        self,
        operation: str,
        group: dist.ProcessGroup,
        dtype: str,
        size: int,
        peer: int | None,
        detail: str,
    ) -> int:
        name = f"{group.group_name} {group.group_desc}".removesuffix(" undefined")
        members = tuple(dist.get_process_group_ranks(group))
        message = Message(
            operation, name, members, dtype, size, peer, detail, self.phase, caller_stack(),
            self._batch,
        )  # fmt: skip
        number = len(self.record.messages)
        self.record.messages.append(message)
        self._running[number] = None
        return number

    def _end(self, number: int) -> None:
        """Write down that what follows waits for a message."""
        if number in self._running:
            del self._running[number]
            self.record.ended.append((len(self.record.messages), number))

    def _work(self, number: int) -> torch.ScriptObject:
        """A message under way, as torch hands it out."""

        def wait(timeout: Any) -> bool:
            self._end(number)
            return True

        return PythonCallbackWork(wait).boxed()

    def batch_isend_irecv(self, operations: list[dist.P2POp]) -> list[dist.Work]:
        """Messages that start together; torch's function asks the backend for it."""
        peers = {dist.isend: "group_dst", dist.irecv: "group_src"}
        self._batches += 1
        self._batch = self._batches
        try:
            return [
                one.op(one.tensor, group=one.group, tag=one.tag, **{peers[one.op]: one.group_peer})
                for one in operations
            ]
        finally:
            self._batch = None

    def object_collectives(self) -> dict[str, Callable]:
        """Collectives of Python objects: every other rank says what this one says."""

        def all_gather_object(found: list, value: Any, group: Any = None) -> None:
            self.write("all_gather_object", group or dist.group.WORLD)
            found[:] = [value] * len(found)

        def gather_object(
            value: Any, found: list | None = None, dst: Any = None, group: Any = None, **root: Any
        ) -> None:
            self.write("gather_object", group or dist.group.WORLD)
            if found is not None:
                found[:] = [value] * len(found)

        def broadcast_object_list(
            values: list, src: Any = None, group: Any = None, *args: Any, **root: Any
        ) -> None:
            self.write("broadcast_object_list", group or dist.group.WORLD)

        return {
            "all_gather_object": all_gather_object,
            "gather_object": gather_object,
            "broadcast_object_list": broadcast_object_list,
        }


def _as_group(value: Any) -> dist.ProcessGroup | None:
    if isinstance(value, dist.ProcessGroup):
        return value
    if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
        return dist.ProcessGroup.unbox(value)
    return None


class _FlashAttention(torch.autograd.Function):
    """What a fused attention kernel keeps for its backward pass, and nothing else."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return _FlashAttention.apply(q, k, v)


@contextmanager
def as_rank(rank: int, world: int, mode: RehearsalMode) -> Iterator[None]:
    """This process as one rank of many, until the block ends.

    Args:
        rank: the rank it plays.
        world: the number of ranks.
        mode: what is to be entered for tensors without data; process groups are made outside of it.
    """
    new_group = dist.new_group

    def written_new_group(ranks: Any = None, *args: Any, **options: Any) -> Any:
        members = list(range(world)) if ranks is None else list(ranks)
        mode.write("new_group", dist.group.WORLD, detail=f"of ranks {members}")
        return new_group(ranks, *args, **options)

    place = {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": "0"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with (
        mock.patch.dict(os.environ, place),
        mock.patch.multiple(
            dist,
            new_group=written_new_group,
            batch_isend_irecv=mode.batch_isend_irecv,
            **mode.object_collectives(),
        ),
        # Nothing computes it for a device of others but with the square of the row in memory.
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention),
        # A process group would put its rank before every error of this process.
        mock.patch.object(sys, "excepthook", sys.excepthook),
        mock.patch.object(layouts, "meet", lambda *_: FakeStore()),  # nobody else comes
        cpu_runtime.made_up_device(device(), {"backend": "fake"}, mode.synchronize),
    ):
        yield
