"""The first import of megatron-core, without what this project does not use of it.

megatron-core applies `torch.compile` to a dozen small functions while it is imported, and only that
loads torch's compiler: a third of all that a rank imports. None of these functions is called by
this project's model, and where one is, it can be compiled then.

It also loads the packages of its own trainer's logs, where they are installed.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Optional for megatron-core: its timers and its inference write there. This project imports them by
# itself, where a run file asks for them.
_LOGS = ("wandb", "torch.utils.tensorboard")


def import_megatron() -> None:
    """Import megatron-core; its compiled functions are compiled when they are first called.

    Commands call this before the modules that import megatron-core. Without the call everything
    works, and starts more slowly.
    """
    compile_now = torch.compile
    torch.compile = functools.partial(_compile_at_first_call, compile_now)
    try:
        with _not_installed(_LOGS):
            importlib.import_module("megatron.core")
            importlib.import_module("megatron.core.optimizer")
            importlib.import_module("megatron.core.pipeline_parallel")
            importlib.import_module("megatron.core.transformer.attention")
    finally:
        torch.compile = compile_now


@contextmanager
def _not_installed(names: tuple[str, ...]) -> Iterator[None]:
    """A block in which modules cannot be imported, but for those that are there already."""
    missing = [name for name in names if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(missing))
    try:
        yield
    finally:
        for name in missing:
            del modules[name]


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
