"""The first import of megatron-core, without torch's compiler.

megatron-core applies `torch.compile` to a dozen small functions while it is imported, and only that
loads torch's compiler: a third of all that a rank imports. None of these functions is called by
this project's model, and where one is, it can be compiled then.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch


def import_megatron() -> None:
    """Import megatron-core; its compiled functions are compiled when they are first called.

    Commands call this before the modules that import megatron-core. Without the call everything
    works, and starts more slowly.
    """
    compile_now = torch.compile
    torch.compile = functools.partial(_compile_at_first_call, compile_now)
    try:
        importlib.import_module("megatron.core")
        importlib.import_module("megatron.core.optimizer")
        importlib.import_module("megatron.core.pipeline_parallel")
        importlib.import_module("megatron.core.transformer.attention")
    finally:
        torch.compile = compile_now


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
