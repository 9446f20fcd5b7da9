"""The one place that makes megatron-core run on a machine without CUDA.

megatron-core hard-codes the CUDA device (`device="cuda"`, `torch.cuda.current_device()`,
`param.type() == "torch.cuda.FloatTensor"`). A second, native trainer would test code that nobody
runs on GPUs. Instead, `activate` gives megatron-core's *own modules* a stand-in for the name
`torch` whose device requests answer "cpu". Nothing outside `megatron.core` sees it: `torch.cuda`
itself is untouched, and this project's code asks `xlstm_mcore.hardware` for the device.

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
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from xlstm_mcore import hardware

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
    cuda = _stand_in().cuda
    before, cuda.synchronize = cuda.synchronize, synchronize
    try:
        with hardware.made_up(device, options):
            yield
    finally:
        cuda.synchronize = before


def activate() -> bool:
    """Make megatron-core run on the CPU. Does nothing where CUDA is present; may be called again.

    Returns:
        Whether the CPU runtime is active.
    """
    if not hardware.without_cuda():
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
        self.current_device = hardware.stand_in
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
            kwargs["device"] = hardware.stand_in()
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
