"""The made-up device as one of DeepSpeed's accelerators, and what DeepSpeed keeps in its memory."""

import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.engines import deepspeed_compat as compat
from pretrain.engines.deepspeed import DeepSpeedEngine
from pretrain.rehearsal.device import NAME, RehearsalMode, device
from pretrain.rehearsal.memory import GATHERED, GRADIENTS, OPTIMIZER, WEIGHTS
from xlstm_io.checkpoint.manifest import is_weight
from xlstm_io.checkpoint.reader import TensorSlice


@contextmanager
def deepspeed_accelerator(mode: RehearsalMode) -> Iterator[None]:
    """DeepSpeed computes on the device that does not exist, until the block ends.

    Args:
        mode: writes down what is seen.

    Raises:
        ConfigError: DeepSpeed is missing or of another release line.
    """
    compat.load(torch.device("cpu"))
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.runtime.zero import utils
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator,
    )

    def broadcast(numbers: list[int], what: str) -> list[int]:
        """Stage 3 compares numbers with those of rank 0, which are not there: `compare` does it."""
        digest = zlib.crc32(repr(numbers).encode())
        detail = f"root 0, {what} with checksum {digest:08x}"
        mode.write("broadcast", dist.group.WORLD, "int64", 8 * len(numbers), detail=detail)
        return numbers

    compat.restart_numbers()
    before = get_accelerator()
    set_accelerator(_accelerator(type(before), mode))
    try:
        with (
            warnings.catch_warnings(),
            # The model is made where it computes. Moving it would swap each parameter with a new
            # one, as torch does it for tensors without data, and hooks hold on to the old one.
            mock.patch.object(nn.Module, "to", lambda module, *args, **options: module),
            mock.patch.object(Tensor, "record_stream", lambda tensor, stream: None),
            mock.patch.object(
                PartitionedParameterCoordinator,
                "fetch_sub_module",
                _of_kind(PartitionedParameterCoordinator.fetch_sub_module, mode, GATHERED),
            ),
            mock.patch.multiple(
                utils,
                assert_lst_len_same_as_other_ranks=lambda one: broadcast([len(one)], "a length"),
                get_lst_from_rank0=lambda numbers: broadcast(numbers, "numbers"),
            ),
        ):
            # It asserts that partitions are aligned: without data they all begin at 0.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        set_accelerator(before)


def claim_lasting(mode: RehearsalMode, engine: DeepSpeedEngine) -> None:
    """Tell apart the weights, the gradients and the optimizer's state.

    Only stage 1 in bf16 keeps buffers for gradients. Otherwise the backward pass makes them, and
    they count as made there.
    """

    def claim(parts: Sequence[TensorSlice]) -> None:
        for part in parts:
            mode.meter.claim(part.tensor, WEIGHTS if is_weight(part.name) else OPTIMIZER)

    for held in engine.held():  # below stage 3 all weights, of which each replica loads its share
        mode.meter.claim(held.tensor, WEIGHTS if is_weight(held.name) else OPTIMIZER)
    engine.load_sharded_state(claim, 0)
    for gradient in compat.gradient_buffers(engine.engine.optimizer):
        mode.meter.claim(gradient, GRADIENTS)


def _of_kind(method: Callable, mode: RehearsalMode, kind: str) -> Callable:
    """A method whose new tensors are of a kind."""

    def call(*args: Any, **options: Any) -> Any:
        with mode.meter.of_kind(kind):
            return method(*args, **options)

    return call


class _Stream:
    """A queue of work, or an event in one: nothing happens there, and nothing has to be waited for.

    Args:
        mode: writes down where the host waits.
    """

    def __init__(self, mode: RehearsalMode) -> None:
        self._mode = mode

    def synchronize(self) -> None:
        """The host waits until the work before is done."""
        self._mode.wait("a stream")

    def query(self) -> bool:
        """Whether the work before is done."""
        return True

    def wait(self, other: "_Stream | None" = None) -> None:
        """Work waits for other work, and the host goes on."""

    wait_stream = wait_event = record_event = record = wait


def _accelerator(base: type, mode: RehearsalMode) -> Any:
    """An accelerator that works on its own while the host goes on, as a GPU does.

    Args:
        base: the class of DeepSpeed's accelerator for CPUs.
        mode: writes down where the host waits.
    """
    stream = _Stream(mode)

    class Rehearsed(base):  # type: ignore[misc, valid-type]
        Stream = Event = property(lambda self: lambda *args, **options: stream)
        FloatTensor = property(lambda self: _filled(torch.float32))
        ByteTensor = property(lambda self: _filled(torch.uint8))

        def device_name(self, device_index: Any = None) -> str:
            return NAME if device_index is None else f"{NAME}:{device_index}"

        def current_device(self) -> int:
            return 0

        def current_device_name(self) -> str:
            return str(device())

        def device_count(self) -> int:
            return 1

        def communication_backend_name(self) -> str:
            return "fake"

        def on_accelerator(self, tensor: Tensor) -> bool:
            return tensor.device.type == NAME

        def is_synchronized_device(self) -> bool:
            return False

        def current_stream(self, device_index: Any = None) -> _Stream:
            return stream

        def default_stream(self, device_index: Any = None) -> _Stream:
            return stream

        def synchronize(self, device_index: Any = None) -> None:
            mode.synchronize()

    return Rehearsed()


def _filled(dtype: torch.dtype) -> Callable[[list], Tensor]:
    return lambda values: torch.tensor(values, dtype=dtype, device=device())
