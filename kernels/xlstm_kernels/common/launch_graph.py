"""Launches as a CUDA graph: captured once, replayed by one call of the host.

A launch from Python costs the host tens of microseconds, a node of a graph about one microsecond of
the GPU. A graph plays launches again with the addresses that they had at the capture, so what they
read and write lies in buffers that stay. `GraphCache` keeps the graphs of a few shapes.

Nothing here has run on a GPU. Tests put a class in the place of torch's graph that records launches
and runs them again in Triton's interpreter.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

from xlstm_kernels.common.device_limits import Device
from xlstm_kernels.common.triton_launch import Launch

_allowed = True


@contextmanager
def without_graphs() -> Iterator[None]:
    """Everything is launched from Python inside, in all threads: to compare results and times."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def can_capture(device: torch.device) -> bool:
    """Whether a graph can be captured or replayed now on the current stream of `device`.

    Inside a capture it cannot: there launches become part of the graph that is being captured.
    """
    if device.type != "cuda" or not _allowed:
        return False
    return not torch.cuda.is_current_stream_capturing()


def device_of(device: torch.device) -> Device | None:
    """What a GPU has; None anywhere else, where a launch has one step and no program waits."""
    if device.type != "cuda":
        return None
    known = torch.cuda.get_device_properties(device)
    shared = getattr(known, "shared_memory_per_block_optin", known.shared_memory_per_block)
    return Device(known.multi_processor_count, shared)


def current_stream(device: torch.device) -> Hashable:
    """What tells streams apart: the buffers of a graph serve one stream, in its order."""
    return torch.cuda.current_stream(device).cuda_stream


class LaunchGraph:
    """Launches that were captured and can be replayed.

    The caller keeps the tensors of the launches alive.

    Args:
        launches: All of one kernel and one specialisation. The first one runs once before the
            capture, because the compiler and the loading of a module must not run inside.
        device: Where they run.

    Raises:
        RuntimeError: They cannot be captured. Nothing should go on in the process then: torch's
            allocator holds the capture to be under way for ever, and returns no more memory to the
            device where it runs short.
    """

    def __init__(self, launches: list[Launch], device: torch.device) -> None:
        self.device = device
        self.graph = torch.cuda.CUDAGraph()
        # The outer stream context restores the current stream, which torch's capture does not do
        # when it fails. Other threads, such as a save in the background, may use the device
        # meanwhile.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()):
            launches[0].run()
            try:
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    for launch in launches:
                        launch.run()
            except RuntimeError as error:
                raise RuntimeError(
                    f"the launches of {launches[0].name!r} could not be captured as a CUDA graph "
                    f"({error}), and torch cannot go on after a broken capture; start again, and "
                    "if that does not help use memory.slstm_form: persistent or "
                    "model.kernel_backend: torch, which capture nothing"
                ) from error

    def replay(self) -> None:
        """Run all launches in their order on the current stream."""
        self.graph.replay()

    def close(self) -> None:
        """Free the graph once the device has finished with it."""
        torch.cuda.synchronize(self.device)
        self.graph.reset()


class Closable(Protocol):
    """What a `GraphCache` holds."""

    def close(self) -> None:
        """Free what it holds on the device."""


Kept = TypeVar("Kept", bound=Closable)


class GraphCache(Generic[Kept]):
    """The graphs that were used last, by key.

    Args:
        most: How many are kept. Another one frees the one whose last use is the longest ago.

    Attributes:
        lock: To be held while the buffers of a graph are in use. The backward pass runs in a
            thread of its own.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.lock = threading.RLock()
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What `make` made for `key`, now or earlier."""
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > self.most:
                _, oldest = self._kept.popitem(last=False)
                oldest.close()
        self._kept.move_to_end(key)
        return self._kept[key]

    def clear(self) -> None:
        """Free everything."""
        while self._kept:
            _, one = self._kept.popitem()
            one.close()
