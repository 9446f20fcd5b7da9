"""The sLSTM's backend "persistent": on Triton, with one launch for all steps of a pass."""

from functools import partial

import torch
from torch import Tensor

from xlstm_kernels.common.launch_graph import device_of
from xlstm_kernels.slstm.operator import scan_operator
from xlstm_kernels.slstm.triton import scan
from xlstm_kernels.slstm.triton.persistent_group import misfit_reason


def unsupported_reason(
    like: Tensor, *, d: int, asked: bool, cell: str = "slstm", batch: int = 1, heads: int = 1
) -> str | None:
    """Why this backend cannot run such a call, with the remedy; None if it can."""
    if not asked:
        return "it runs where it is asked for"
    reason = scan.unsupported_reason(like, d=d, asked=asked, cell=cell)
    if reason is not None:
        return reason
    device = device_of(like.device)
    if device is None:  # the interpreter, or tensors without data
        return None
    if torch.version.hip is not None:
        return "it was compiled for NVIDIA's GPUs alone; use 'triton'"
    if like.dtype != torch.bfloat16:
        return f"it holds weights in bfloat16 and is given {like.dtype}; convert, or use 'triton'"
    reason = misfit_reason(batch, heads, d, device)
    return None if reason is None else f"{reason}; use 'triton'"


scan_forward = scan_operator(
    "slstm_scan_persistent",
    forward=partial(scan.forward, persistent=True),
    allocate=scan.allocate,
    backward=partial(scan.backward, persistent=True),
    allocate_gradients=scan.allocate_gradients,
    keeps_output=True,
)
