"""The one place that makes megatron-core run on a machine without CUDA.

megatron-core hard-codes the CUDA device (`device="cuda"`, `torch.cuda.current_device()`,
`param.type() == "torch.cuda.FloatTensor"`). A second, native trainer would test code that nobody
runs on GPUs. Instead, `activate` gives megatron-core's *own modules* a stand-in for the name
`torch` whose device requests answer "cpu". Nothing outside `megatron.core` sees it: `torch.cuda`
itself is untouched, and this project's code asks its layout for the device.

It does three things, each with a test that fails without it
(tests/xlstm_mcore/test_cpu_runtime.py, tests/dist/test_cpu_runtime_dist.py):

1. Device requests in module code are answered by the stand-in for `torch` (`_TorchOnCpu`).
2. Device requests as tensor methods (`t.type()`, `t.cuda()`) cannot be reached through a module
   attribute. A `TorchFunctionMode` answers them, entered only inside the few megatron-core calls
   that need it.
3. Random state: a tracker of CPU states stands behind `tensor_parallel.get_cuda_rng_tracker()`.

Gloo needs one more rule, `pipeline_settings`: with batched point-to-point messages and
interleaved stages gloo pairs the wrong messages, and gradients are *silently* wrong.
"""

import contextlib
import functools
import importlib
import os
import resource
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from xlstm_io.errors import ConfigError

# Modules that must have the stand-in before a model is built. Modules that megatron-core imports
# later get it by calling activate() again, which build and engine do.
_MODULES = (
    "megatron.core.distributed",
    "megatron.core.models.common.embeddings.language_model_embedding",
    "megatron.core.models.common.language_module.language_module",
    "megatron.core.optimizer",
    "megatron.core.parallel_state",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel",
    "megatron.core.tensor_parallel.random",
)

# (module, class or None, name) of calls that ask tensors themselves for a CUDA type.
_METHOD_CALLS = (
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer", "__init__"),
    ("megatron.core.optimizer.optimizer", "Float16OptimizerWithFloat16Params", "__init__"),
    ("megatron.core.optimizer.clip_grads", None, "clip_grad_by_total_norm_fp32"),
    (
        "megatron.core.models.common.language_module.language_module",
        "LanguageModule",
        "setup_embeddings_and_output_layer",
    ),
)

_CPU = torch.device("cpu")
# Options of `init_process_group` while a made-up device stands in for the CPU.
_made_up: dict[str, Any] | None = None


@contextlib.contextmanager
def made_up_device(
    device: torch.device, options: dict[str, Any], synchronize: Callable[..., None]
) -> Iterator[None]:
    """Let another device than the CPU stand in for CUDA, for tensors without data.

    Megatron-core's modules keep the stand-in for `torch` afterwards, so a process that has been in
    here trains on the CPU only.

    Args:
        device: what device requests are answered with.
        options: of `init_process_group`.
        synchronize: called where megatron-core lets the host wait for the whole device.
    """
    global _CPU, _made_up
    cuda = _stand_in().cuda
    before = _CPU, _made_up, cuda.synchronize
    _CPU, _made_up, cuda.synchronize = device, options, synchronize
    try:
        yield
    finally:
        _CPU, _made_up, cuda.synchronize = before


def needed() -> bool:
    """Whether no CUDA device can be used, so that megatron-core needs this runtime."""
    return _made_up is not None or not torch.cuda.is_available()


def device() -> torch.device:
    """The device this process computes on: its current CUDA device, or the CPU."""
    return _CPU if needed() else torch.device("cuda", torch.cuda.current_device())


def choose_device() -> torch.device:
    """Make the CUDA device of this process, by LOCAL_RANK, its current one; a CPU stays as it is.

    Until then `device` is the first one in every process.

    Raises:
        ConfigError: there are several devices, and none of that number.
    """
    if not needed():
        index = device_index(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count())
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
    return {"backend": "gloo" if needed() else "nccl"}


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


def device_name() -> str:
    """The product name of this process's device ("" for a CPU)."""
    return "" if needed() else torch.cuda.get_device_name()


def peak_memory_bytes() -> int:
    """The most memory this process has used: device memory on CUDA, resident memory on a CPU."""
    if needed():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return torch.cuda.max_memory_allocated()


def memory_bytes() -> int:
    """The memory this process uses now, counted as in `peak_memory_bytes`."""
    if needed():
        with open("/proc/self/statm", encoding="ascii") as pages:
            return int(pages.read().split()[1]) * resource.getpagesize()
    return torch.cuda.memory_allocated()


def device_memory_bytes() -> int:
    """All memory of this process's device: the GPU's, or the machine's."""
    if needed():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def save_memory_snapshot(path: Path) -> bool:
    """Write what lies in the device's memory, for pytorch.org/memory_viz.

    Returns:
        Whether there is such a file now: there is none for a CPU, nor where it cannot be written.
    """
    if needed():
        return False
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError):
        return False
    return True


def mark() -> Any:
    """A point in this device's work: an event of the stream that computes, or the CPU's clock."""
    if needed():
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
    if needed() or memory.numel() == 0:
        return
    runtime, address = torch.cuda.cudart(), memory.data_ptr()
    # A thread begins at device 0, and would take memory there for a context of its own.
    with torch.cuda.device(device):
        pinned = int(runtime.cudaHostRegister(address, memory.nbytes, 0)) == 0
    if pinned:
        weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, address)


def activate() -> bool:
    """Make megatron-core run on the CPU. Does nothing where CUDA is present; may be called again.

    Returns:
        Whether the CPU runtime is active.
    """
    if not needed():
        return False
    for name in _MODULES:
        importlib.import_module(name)
    stand_in = _stand_in()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and vars(module).get("torch") is torch:
            module.torch = stand_in
    for module_name, class_name, name in _METHOD_CALLS:
        _redirect_methods_in(module_name, class_name, name)
    _install_rng_tracker()
    return True


def pipeline_settings(backend: str, virtual: int = 1) -> dict[str, Any]:
    """Point-to-point settings of `TransformerConfig` that are right on a communication backend.

    On gloo, `batch_p2p_comm=True` with interleaved stages gives a gradient norm two orders of
    magnitude off without any error, and `overlap_p2p_comm=True` frees buffers still being sent.
    Elsewhere the settings are those of Megatron's own arguments: interleaved stages overlap their
    messages with computation, which excludes batches, and others send in batches. A stage's output
    gives its memory back once it is sent.

    Args:
        backend: Name of the torch.distributed backend, "gloo" or "nccl".
        virtual: Stages per process.
    """
    overlaps = backend != "gloo" and virtual > 1
    return {
        "batch_p2p_comm": backend != "gloo" and not overlaps,
        # By default the host waits for the device after every batch, because until release 1.13 of
        # torch (pull request 82450) waiting for a batch did not hold back the stream that computes.
        "batch_p2p_sync": False,
        "overlap_p2p_comm": overlaps,
        "deallocate_pipeline_outputs": backend != "gloo",
    }


class _CudaOnCpu(types.ModuleType):
    """`torch.cuda` as megatron-core sees it on a CPU; it answers device requests with "cpu"."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.current_device = lambda: _CPU
        self.synchronize: Callable[..., None] = lambda device=None: None
        self.current_stream = torch.cpu.current_stream
        self.default_stream = torch.cpu.current_stream
        self.manual_seed = torch.default_generator.manual_seed
        self.get_rng_state = lambda device=None: torch.get_rng_state()
        self.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
        self.empty_cache = lambda: None
        self.is_current_stream_capturing = lambda: False

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchOnCpu(types.ModuleType):
    """The module `torch` with device requests for CUDA turned into requests for the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCpu()
        for name in ("arange", "empty", "full", "ones", "tensor", "zeros", "rand", "randn"):
            setattr(self, name, _on_cpu(getattr(torch, name)))
        for name in ("empty_like", "full_like", "ones_like", "zeros_like", "as_tensor"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@functools.cache
def _stand_in() -> _TorchOnCpu:
    return _TorchOnCpu()


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return call


class _TensorMethods(TorchFunctionMode):
    """Makes `t.type()` return CUDA's type names and keeps `t.cuda()` on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return f"torch.cuda.{result.rpartition('.')[2]}"
        return result


def _redirect_methods_in(module_name: str, class_name: str | None, name: str) -> None:
    module = importlib.import_module(module_name)
    owner = getattr(module, class_name) if class_name else module
    original = getattr(owner, name)
    if getattr(original, "_xlstm_on_cpu", False):
        return

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _TensorMethods():
            return original(*args, **kwargs)

    call._xlstm_on_cpu = True
    setattr(owner, name, call)
    if class_name is None:  # modules that imported the function by name hold the original
        for other_name, other in list(sys.modules.items()):
            if other_name.startswith("megatron.core") and vars(other).get(name) is original:
                setattr(other, name, call)


def _install_rng_tracker() -> None:
    """Put a tracker of CPU random states where megatron-core looks for the CUDA one.

    Replacing only `torch.cuda.get_rng_state` is not enough: setting a state goes through
    `torch.cuda`'s lazy queue, which never runs without CUDA, so every fork would continue with the
    same numbers.
    """
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    if getattr(random._CUDA_RNG_STATE_TRACKER, "_xlstm_on_cpu", False):
        return

    class CpuRngStatesTracker(random.CudaRNGStatesTracker):
        """Named random states of the CPU generator; same interface as megatron-core's."""

        _xlstm_on_cpu = True

        def add(self, name: str, seed: int) -> None:
            """Track a new state `name` seeded with `seed`."""
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"rng state {name!r} or seed {seed} exists already")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Any:
            """Run the block with state `name`, then go back to the state before it."""
            if name not in self.states_:
                raise KeyError(f"rng state {name!r} was not added")
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    random._CUDA_RNG_STATE_TRACKER = CpuRngStatesTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
