"""Products of bf16 matrices on CPUs that have no instructions for them.

People train in bf16. A CPU without such instructions computes a bf16 product a hundred times slower
than an fp32 one, so nobody could try a bf16 run there. The same number comes out of fp32: bf16
operands are fp32 numbers, a GPU too adds their products up in fp32, and the result is rounded once.
"""

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pretrain.layout import Layout

_ATEN = torch.ops.aten
# Each product, and the form of it that makes a new tensor.
_PRODUCTS = {
    _ATEN.mm.default: _ATEN.mm.default,
    _ATEN.mm.out: _ATEN.mm.default,
    _ATEN.bmm.default: _ATEN.bmm.default,
    _ATEN.bmm.out: _ATEN.bmm.default,
    _ATEN.addmm.default: _ATEN.addmm.default,
    _ATEN.addmm.out: _ATEN.addmm.default,
    _ATEN.addmm_.default: _ATEN.addmm.default,
    _ATEN.baddbmm.default: _ATEN.baddbmm.default,
    _ATEN.baddbmm.out: _ATEN.baddbmm.default,
    _ATEN.baddbmm_.default: _ATEN.baddbmm.default,
    _ATEN.mv.default: _ATEN.mv.default,
    _ATEN.dot.default: _ATEN.dot.default,
}
_IN_PLACE = {_ATEN.addmm_.default, _ATEN.baddbmm_.default}
_PROBE = 256  # rows and columns of the matrices that are timed
_TIMES = 3


class RoundedProducts(TorchDispatchMode):
    """Inside it, products of bf16 matrices are computed in fp32 and rounded once."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        operation = _PRODUCTS.get(func)
        if operation is None or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        out = args[0] if func in _IN_PLACE else kwargs.pop("out", None)
        result = operation(*tree_map(_widened, args), **kwargs)
        return result.bfloat16() if out is None else out.copy_(result)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


@functools.cache
def slow_natively() -> bool:
    """Whether this CPU's own products of bf16 matrices are slower than those through fp32."""
    a = torch.ones(_PROBE, _PROBE, dtype=torch.bfloat16)
    through_fp32 = _seconds(lambda: (a.float() @ a.float()).bfloat16())
    return _seconds(lambda: a @ a) > through_fp32


def _seconds(function: Callable[[], Tensor]) -> float:
    """The fastest of a few calls, after one that warms up."""
    found = []
    for _ in range(_TIMES + 1):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return min(found[1:])


def products_for(precision: str, layout: Layout) -> Callable[[], AbstractContextManager]:
    """How an engine computes products: in the device's own way, or rounded from fp32.

    Called by all ranks. They must round alike, so all of them do what one of them needs.

    Args:
        precision: of the run, "fp32" or "bf16".
        layout: where this process stands.

    Returns:
        What makes the context in which the engine computes.
    """
    if precision != "bf16" or layout.device.type != "cpu":
        return nullcontext
    return RoundedProducts if layout.max(float(slow_natively())) else nullcontext
