"""Argument checks of the public functions: value, rule and remedy in one ValueError."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype that gates, states and norms are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_float(name: str, tensor: Tensor, ndim: int, layout: str) -> None:
    """Require a floating-point tensor with `ndim` axes, none of them empty."""
    if tensor.ndim != ndim:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but must have the {ndim} axes {layout}; "
            "reshape or permute it"
        )
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}, but must be floating point; "
            "convert it to float32, bfloat16, float16 or float64"
        )
    if 0 in tensor.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but no axis of {layout} may be empty; "
            "pass at least one element on each"
        )


def check_like(name: str, tensor: Tensor, shape: tuple[int, ...], layout: str, like: Tensor):
    """Require a floating-point tensor of exactly `shape` on the device of `like`."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but must be {layout} = {list(shape)} "
            "to fit the other arguments; reshape or permute it"
        )
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}, but must be floating point; "
            "convert it to float32, bfloat16, float16 or float64"
        )
    check_device(name, tensor, like)


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Require `tensor` to be on the device of `like`."""
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device}, but all arguments must be on one device; "
            f"move it to {like.device}"
        )


def check_boundaries(boundaries: Tensor | None, batch: int, length: int, like: Tensor) -> None:
    """Require document boundaries to be bool [b, s] on the device of `like`, or None."""
    if boundaries is None:
        return
    if boundaries.dtype != torch.bool:
        raise ValueError(
            f"boundaries has dtype {boundaries.dtype}, but must be torch.bool "
            "(True at the first token of a document); convert it with .bool()"
        )
    if tuple(boundaries.shape) != (batch, length):
        raise ValueError(
            f"boundaries has shape {list(boundaries.shape)}, but must be [b, s] = "
            f"{[batch, length]}; pass one flag for each token"
        )
    check_device("boundaries", boundaries, like)


def check_no_tangents(kernel: str, *tensors: Tensor | None) -> None:
    """Raise where forward-mode differentiation is asked for: custom operators would return zero.

    Raises:
        NotImplementedError: A tensor carries a tangent.
    """
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{kernel} has no forward-mode derivative; use backward()")


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Require `value` to be one of `choices`."""
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} is not known; use one of {', '.join(map(repr, choices))}"
        )


def check_state(state: object, parts: dict[str, tuple[tuple[int, ...], str]], like: Tensor):
    """Require a recurrent state: a tuple or list of tensors with the named shapes."""
    if not isinstance(state, (tuple, list)) or len(state) != len(parts):
        raise ValueError(
            f"the state is {type(state).__name__} of length "
            f"{len(state) if hasattr(state, '__len__') else 'none'}, but must be the tuple "
            f"({', '.join(parts)}); pass one that this package returned"
        )
    for tensor, (name, (shape, layout)) in zip(state, parts.items(), strict=True):
        check_like(f"state {name}", tensor, shape, layout, like)
