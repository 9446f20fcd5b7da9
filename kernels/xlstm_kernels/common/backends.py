"""Choice of a backend for a kernel call, by device, dtype and shape.

A backend is an implementation of one public function. "torch" runs on every device and dtype; the
others are tested against it. Another one is a line of `BACKENDS`, and the module it names has a
function `unsupported_reason(like, *, asked, **facts)` that returns why it cannot run a call (with
the remedy) or None. What was chosen and why is logged once.
"""

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Backend(NamedTuple):
    """One implementation of a public function."""

    name: str
    module: str | None = None  # whose `unsupported_reason` decides; None: runs everywhere
    needs: str | None = None  # a package


class Like(NamedTuple):
    """What backends may know of an input of the call."""

    device: torch.device
    dtype: torch.dtype


TORCH = Backend("torch")

# In order of preference.
BACKENDS = {
    "mlstm_chunkwise": (
        Backend("triton", "xlstm_kernels.mlstm.triton.chunkwise", "triton"),
        TORCH,
    ),
    "mlstm_step": (Backend("triton", "xlstm_kernels.mlstm.triton.step", "triton"), TORCH),
    "slstm_scan": (
        Backend("triton", "xlstm_kernels.slstm.triton.scan", "triton"),
        Backend("numba", "xlstm_kernels.slstm.numba.scan", "numba"),
        Backend("persistent", "xlstm_kernels.slstm.triton.persistent_scan", "triton"),
        TORCH,
    ),
    "slstm_step": (Backend("triton", "xlstm_kernels.slstm.triton.step", "triton"), TORCH),
    "causal_conv1d": (
        Backend("triton", "xlstm_kernels.conv.triton", "triton"),
        Backend("numba", "xlstm_kernels.conv.numba", "numba"),
        TORCH,
    ),
    "multihead_norm": (
        Backend("triton", "xlstm_kernels.norm.triton", "triton"),
        Backend("numba", "xlstm_kernels.norm.numba", "numba"),
        TORCH,
    ),
    "gated_activation": (
        Backend("triton", "xlstm_kernels.gated.triton", "triton"),
        Backend("numba", "xlstm_kernels.gated.numba", "numba"),
        TORCH,
    ),
    "gated_skip": (Backend("numba", "xlstm_kernels.gated.numba_skip", "numba"), TORCH),
    "qkv_and_gates": (
        Backend("triton", "xlstm_kernels.qkv.triton", "triton"),
        Backend("numba", "xlstm_kernels.qkv.numba", "numba"),
        TORCH,
    ),
    "cross_entropy": (
        Backend("triton", "xlstm_kernels.cross_entropy.triton", "triton"),
        Backend("numba", "xlstm_kernels.cross_entropy.numba", "numba"),
        TORCH,
    ),
}


def select_backend(kernel: str, backend: str | None, like: Tensor, **facts) -> str:
    """Name of the backend that runs `kernel`: the requested one, or the best one that can.

    Args:
        kernel: A key of `BACKENDS`.
        backend: The requested one, or None for the best one.
        like: An input of the call, of which device and dtype count.
        facts: What else backends decide by, such as sizes.

    Raises:
        ValueError: If `backend` names something that `kernel` does not have (the message lists
            what exists), or that cannot run this call (the message says why).
    """
    return _select(kernel, backend, like.device, like.dtype, tuple(facts), tuple(facts.values()))


def _select(
    kernel: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    names: tuple,
    values: tuple,
) -> str:
    like, facts = Like(device, dtype), dict(zip(names, values, strict=True))
    available = BACKENDS[kernel]
    if backend is None:
        reasons = []
        for one in available:
            reason = _unsupported_reason(one, like, False, facts)
            if reason is None:
                why = "; ".join(reasons) or "it is the preferred one and can run this call"
                _say_once(kernel, one.name, str(device), why)
                return one.name
            reasons.append(f"not {one.name!r}: {reason}")
    for one in available:
        if one.name == backend:
            reason = _unsupported_reason(one, like, True, facts)
            if reason is not None:
                raise ValueError(f"backend={backend!r} cannot run this {kernel}: {reason}")
            _say_once(kernel, one.name, str(device), "asked for")
            return one.name
    raise ValueError(
        f"backend={backend!r} does not exist for {kernel}; "
        f"use one of {', '.join(repr(one.name) for one in available)}, or None for the best one"
    )


# torch.compile does not look inside. `torch.compiler.assume_constant_result` sets just this, but
# would load the compiler in every process.
_select._dynamo_marked_constant = True


def _unsupported_reason(one: Backend, like: Like, asked: bool, facts: dict) -> str | None:
    if one.module is None:
        return None
    if one.needs is not None and not _installed(one.needs):
        return f"the package {one.needs!r} is not installed; pip install {one.needs}"
    if not asked and one.needs == "triton" and like.device.type == "cpu":
        return "the tensors are on the CPU"  # without the import of Triton, which takes a second
    return import_module(one.module).unsupported_reason(like, asked=asked, **facts)


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


@cache
def _say_once(kernel: str, name: str, device: str, why: str) -> None:
    log.info("%s on %s: backend %r (%s)", kernel, device, name, why)
