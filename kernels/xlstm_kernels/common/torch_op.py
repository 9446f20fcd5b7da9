"""How the PyTorch implementations become operators of torch: one decorator."""

from collections.abc import Callable
from functools import wraps

import torch


def torch_op(name: str) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Register a function of tensors as the custom op `xlstm_kernels::<name>`.

    As one operator with a fake implementation and a registered gradient, the function works
    under torch.compile (which does not look inside), FakeTensor and activation recomputation, and
    what its backward pass needs is saved where recomputation can drop it. Inside, autocast is off:
    the dtypes of a recurrence are those of its arguments, which products in bfloat16 would undo.

    The function's first argument is a tensor; results are new tensors that share no memory.
    """

    def register(function: Callable) -> torch.library.CustomOpDef:
        @wraps(function)
        def without_autocast(like, *arguments):
            with torch.autocast(like.device.type, enabled=False):
                return function(like, *arguments)

        return torch.library.custom_op(f"xlstm_kernels::{name}", without_autocast, mutates_args=())

    return register
