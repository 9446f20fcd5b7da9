"""The device that this process computes on: which one it is, what it holds, when it is done.

Without a device of CUDA that is the CPU, or for tensors without data a device that is made up.
"""

import contextlib
import os
import resource
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from xlstm_io.errors import ConfigError

# Of a GPU. Older ones cannot multiply bf16 numbers, and Triton is not made for them.
OLDEST_CAPABILITY = 8, 0
# What stands in for a device of CUDA.
_stand_in = torch.device("cpu")
# Options of `init_process_group` while a made-up device stands in.
_made_up: dict[str, Any] | None = None


@contextlib.contextmanager
def made_up(device: torch.device, options: dict[str, Any]) -> Iterator[None]:
    """Let another device than the CPU stand in for CUDA.

    Args:
        device: what requests are answered with.
        options: of `init_process_group`.
    """
    global _stand_in, _made_up
    before = _stand_in, _made_up
    _stand_in, _made_up = device, options
    try:
        yield
    finally:
        _stand_in, _made_up = before


def stand_in() -> torch.device:
    """What stands in for a device of CUDA: the CPU, unless another one is made up."""
    return _stand_in


def without_cuda() -> bool:
    """Whether no CUDA device can be used."""
    return _made_up is not None or not torch.cuda.is_available()


def device() -> torch.device:
    """The device this process computes on: its current CUDA device, or the CPU."""
    return _stand_in if without_cuda() else torch.device("cuda", torch.cuda.current_device())


def choose_device() -> torch.device:
    """Make the CUDA device of this process, by LOCAL_RANK, its current one; a CPU stays as it is.

    Until then `device` is the first one in every process.

    Raises:
        ConfigError: there are several devices, and none of that number; or the device is too old.
    """
    if not without_cuda():
        index = device_index(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count())
        check_capability(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed reads it for the same purpose
        torch.cuda.set_device(index)
    return device()


def process_group_options() -> dict[str, Any]:
    """Options of `init_process_group` for this process's device; chooses the device first."""
    if _made_up is not None:
        return dict(_made_up)
    choose_device()
    # No `device_id`: with it every group makes its communicator at once, all ranks together (over a
    # thousand at 128 ranks), and its messages stand in one line, where a pipeline's are to overlap.
    return {"backend": "gloo" if without_cuda() else "nccl"}


def device_index(local_rank: int, visible: int) -> int:
    """Which of the visible devices a process uses.

    Args:
        local_rank: number of the process on its node.
        visible: how many devices the process can see.

    Raises:
        ConfigError: there are several devices, and none of that number.
    """
    if local_rank < visible:
        return local_rank
    if visible == 1:
        # Slurm has bound the task to a device, which is number 0 for the process.
        print(f"LOCAL_RANK={local_rank} sees one device and uses it", file=sys.stderr, flush=True)
        return 0
    raise ConfigError(
        f"LOCAL_RANK={local_rank}, but this process sees {visible} devices, numbered from 0; start "
        "as many processes per node as it has devices, and with Slurm use --gpu-bind=none, so that "
        "every task sees all of them"
    )


def check_device() -> None:
    """Require that the current GPU of this process is not too old.

    Raises:
        ConfigError: it is.
    """
    check_capability(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def check_capability(name: str, capability: tuple[int, int]) -> None:
    """Require a GPU that is not older than bf16 and the kernels' compiler allow.

    Args:
        name: its product name.
        capability: its compute capability, as `torch.cuda.get_device_capability` gives it.

    Raises:
        ConfigError: it is older.
    """
    if capability < OLDEST_CAPABILITY:
        has, least = (".".join(map(str, one)) for one in (capability, OLDEST_CAPABILITY))
        raise ConfigError(
            f"{name} has compute capability {has}, and the least is {least}: older GPUs cannot "
            "multiply bf16 numbers, and Triton has no kernels for them; use a newer GPU, or "
            "CUDA_VISIBLE_DEVICES= in front of the command to compute on the CPU"
        )


def device_name() -> str:
    """The product name of this process's device ("" for a CPU)."""
    return "" if without_cuda() else torch.cuda.get_device_name()


def peak_memory_bytes() -> int:
    """The most memory this process has used: device memory on CUDA, resident memory on a CPU."""
    if without_cuda():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return torch.cuda.max_memory_allocated()


def memory_bytes() -> int:
    """The memory this process uses now, counted as in `peak_memory_bytes`."""
    if without_cuda():
        with open("/proc/self/statm", encoding="ascii") as pages:
            return int(pages.read().split()[1]) * resource.getpagesize()
    return torch.cuda.memory_allocated()


def forget_memory() -> None:
    """Give back memory of the GPU that holds nothing, and count the peak from here; not on a CPU.

    PyTorch would keep it, out of reach of libraries that ask the driver (NCCL, cuBLAS).
    """
    if not without_cuda():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def device_memory_bytes() -> int:
    """All memory of this process's device: the GPU's, or the machine's."""
    if without_cuda():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def save_memory_snapshot(path: Path) -> bool:
    """Write what lies in the device's memory, for pytorch.org/memory_viz.

    Returns:
        Whether there is such a file now: there is none for a CPU, nor where it cannot be written.
    """
    if without_cuda():
        return False
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError):
        return False
    return True


def mark() -> Any:
    """A point in this device's work: an event of the stream that computes, or the CPU's clock."""
    if without_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Any, last: Any) -> float:
    """Seconds between two marks; waits until the device has passed the second one."""
    if isinstance(last, float):
        return last - first
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def pin(memory: torch.Tensor, device: torch.device) -> None:
    """Pin host memory where it is, so that copies from `device` into it need no detour.

    Without CUDA nothing happens. Memory that cannot be pinned stays as it is: copies are slower
    then. It is unpinned before it is freed.
    """
    if without_cuda() or memory.numel() == 0:
        return
    runtime, address = torch.cuda.cudart(), memory.data_ptr()
    # A thread begins at device 0, and would take memory there for a context of its own.
    with torch.cuda.device(device):
        pinned = int(runtime.cudaHostRegister(address, memory.nbytes, 0)) == 0
    if pinned:
        weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, address)
