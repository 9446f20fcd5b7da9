"""Host memory for a copy of what a rank saves, taken once and used for every save."""

import mmap
import threading
from collections.abc import Sequence

import torch

from xlstm_io.checkpoint.reader import TensorSlice
from xlstm_mcore import hardware

ALIGNMENT = 64  # bytes; any dtype may view the host memory at a multiple of this


class HostCopy:
    """Host memory for one copy of this rank's slices, used again for every save."""

    def __init__(self) -> None:
        self._layout: list[tuple] = []
        self._copies: list[TensorSlice] = []
        self._thread: threading.Thread | None = None

    def prepare(self, slices: Sequence[TensorSlice]) -> None:
        """Take the memory for copies of these slices in a thread; `take` waits for it.

        In ordinary memory nothing is gained, and it stays with the system until the first save.
        """
        slices = [part for part in slices if part.tensor.numel()]
        if not any(part.tensor.device.type != "cpu" for part in slices):
            return

        def allocate() -> None:
            self._copies, self._layout = _allocate(slices), _layout_of(slices)

        self._thread = threading.Thread(target=allocate, name="pin-memory", daemon=True)
        self._thread.start()

    def take(self, slices: Sequence[TensorSlice]) -> list[TensorSlice]:
        """Copies of all slices; they are valid until the next call."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        slices = [part for part in slices if part.tensor.numel()]
        layout = _layout_of(slices)
        if layout != self._layout:
            self._copies = []  # frees the memory before more is taken
            self._copies, self._layout = _allocate(slices), layout
        on_device = False
        with torch.no_grad():
            for part, copy in zip(slices, self._copies, strict=True):
                copy.tensor.copy_(part.tensor.detach(), non_blocking=True)
                on_device |= part.tensor.device.type != "cpu"
        if on_device:
            torch.accelerator.synchronize()
        return self._copies


def _layout_of(slices: Sequence[TensorSlice]) -> list[tuple]:
    return [(p.name, p.global_offset, p.tensor.shape, p.tensor.dtype) for p in slices]


def _allocate(slices: Sequence[TensorSlice]) -> list[TensorSlice]:
    """The same slices with contiguous tensors, all in one allocation of host memory.

    It is pinned where it is, because torch's own pinned memory is rounded up to a power of two: 24
    GB of a 7B model would take 32. Processes that are forked do not inherit it, because the system
    would copy all of what is pinned for each of them.
    """
    starts, end = [], 0
    for part in slices:
        starts.append(end)
        size = part.tensor.numel() * part.tensor.element_size()
        end += -(-size // ALIGNMENT) * ALIGNMENT
    pages = mmap.mmap(-1, max(end, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_DONTFORK"):  # Linux
        pages.madvise(mmap.MADV_DONTFORK)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    for part in slices:
        if part.tensor.device.type != "cpu":
            hardware.pin(memory, part.tensor.device)
            break
    copies = []
    for part, start in zip(slices, starts, strict=True):
        size = part.tensor.numel() * part.tensor.element_size()
        view = memory[start : start + size].view(part.tensor.dtype).view(part.tensor.shape)
        copies.append(TensorSlice(part.name, part.global_shape, part.global_offset, view))
    return copies
