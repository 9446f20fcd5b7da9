"""The first import of megatron-core, without what this project does not use of it.

Half of what a rank would import are modules that megatron-core asks for and this project's model
never reaches:

- torch's compiler. megatron-core applies `torch.compile` to a dozen small functions while it is
  imported. None of them is called by this project, and where one is, it can be compiled then.
- packages that megatron-core can do without, and says so by `try`: torch's FSDP, symmetric memory,
  Triton, and the logs of its own trainer.
- modules that it imports without `try`, in one version or another: torch's distributed tensors,
  with a system for symbolic mathematics behind them; torch's checkpoints, which its own derive
  from; torch's builder of C++ extensions, which imports setuptools; kernels for experts.

Each of them is there as before when something else imports it later. torch's optimizers would do
so: they import its compiler to tell it what not to compile.
"""

import functools
import gc
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Optional for megatron-core. This project imports Triton and the logs by itself, where a run uses
# them.
_OPTIONAL = (
    "torch.distributed._symmetric_memory",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "triton",
    "wandb",
)
# Imported in any case, and not used.
_UNUSED = (
    "megatron.core.transformer.moe.ops",
    "torch.distributed._tensor",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch.utils.cpp_extension",
)


def import_megatron() -> None:
    """Import megatron-core; its compiled functions are compiled when they are first called.

    Commands call this before the modules that import megatron-core. Without the call everything
    works, and starts more slowly.
    """
    with no_collections():
        import torch

        compile_now = torch.compile
        torch.compile = functools.partial(_compile_at_first_call, compile_now)
        try:
            with _not_installed(_OPTIONAL), _stand_ins(_UNUSED):
                importlib.import_module("megatron.core")
                importlib.import_module("megatron.core.optimizer")
                importlib.import_module("megatron.core.pipeline_parallel")
                importlib.import_module("megatron.core.transformer.attention")
        finally:
            torch.compile = compile_now
        _leave_marks_out()


def _leave_marks_out() -> None:
    """Let torch mark what must not be compiled without its compiler, as long as that is not there.

    The marks import `torch._dynamo` at the first call of what they mark: a third of a rank's
    imports, for nothing where nothing is compiled. Those in torch's custom operators, of which this
    project's kernels are some, work as before once something has imported it. Those of Adam are
    gone for the process. Where a version of torch has other marks, they stay.
    """
    import torch
    from torch.optim import Adam, Optimizer

    mark: Any = torch._disable_dynamo
    if not isinstance(mark, functools.partial):
        vars(torch)["_disable_dynamo"] = functools.partial(_marked, mark)
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if method is not None:
            method.__dynamo_disable = method
    step = inspect.unwrap(Adam.step)
    if step is not Adam.step:
        # The other half of its mark turns gradients off, but for updates to differentiate through.
        Adam.step = torch.no_grad()(step)


def _marked(mark: Callable, function: Callable | None = None, recursive: bool = True) -> Callable:
    """What torch's mark returns, with a function that is called without it where it has no use."""
    if function is None:
        return functools.partial(_marked, mark, recursive=recursive)
    marked = mark(function, recursive)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return (marked if "torch._dynamo" in sys.modules else function)(*args, **options)

    return call


@contextmanager
def no_collections() -> Iterator[None]:
    """A block of imports without Python's garbage collector.

    Imports make hundreds of thousands of objects that stay. The collector walks all of them again
    and again and finds nothing to free: a sixth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _not_installed(names: Sequence[str]) -> Iterator[None]:
    """A block in which modules cannot be imported, but for those that are there already."""
    missing = [name for name in names if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(missing))
    try:
        yield
    finally:
        for name in missing:
            del modules[name]


@contextmanager
def _stand_ins(names: Sequence[str]) -> Iterator[None]:
    """A block in which modules are imported as `_StandIn`, but for those that are there already.

    Args:
        names: of the modules; what lies in them is a stand-in too.
    """
    finder = _Finder([name for name in names if name not in sys.modules])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for module in finder.made:
            del sys.modules[module.__name__]
            parent, _, name = module.__name__.rpartition(".")
            if vars(sys.modules.get(parent, module)).get(name) is module:
                delattr(sys.modules[parent], name)


class _Finder(MetaPathFinder, Loader):
    """Gives stand-ins for some modules and for what lies in them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.made = names, list[ModuleType]()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if any(f"{fullname}.".startswith(f"{name}.") for name in self.names):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.made.append(_StandIn(spec.name))
        return self.made[-1]

    def exec_module(self, module: ModuleType) -> None:
        """Nothing has to be run."""


class _StandIn(ModuleType):
    """A module whose every name is a class that nothing is an instance of."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (_NotImported,), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _NotImported:
    """What a stand-in holds: other classes can derive from it, and it cannot be used."""

    def __new__(cls, *args: Any, **options: Any) -> "_NotImported":
        """Say which class it would be.

        Raises:
            ImportError: always.
        """
        raise ImportError(
            f"{cls.__module__}.{cls.__qualname__} was left out of the import of megatron-core; "
            "see xlstm_mcore.megatron.first_import"
        )


def _compile_at_first_call(
    compile_now: Callable, function: Callable | None = None, **options: Any
) -> Callable:
    """What `torch.compile` returns, later: for a function, or as a decorator with options."""
    if function is None:
        return functools.partial(_compile_at_first_call, compile_now, **options)
    compiled: Callable | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = compile_now(function, **options)
        return compiled(*args, **kwargs)

    return call
