"""The norm of a gradient and its clipping, without waiting for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements that are in fp64 at a time on the CPU: 2 MiB, which the caches hold.
_PART = 1 << 18


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of all elements' squares, added up in fp64.

    In fp32 the CPU adds the squares of a tensor one after the other: at 20 million elements the
    norm is 0.1 % too small, and it depends on how tensors are cut over ranks.

    Args:
        tensors: of any shape; none at all gives 0.
        device: where they are.

    Returns:
        fp64 scalar on `device`.
    """
    if device.type != "cpu" and tensors:
        norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float64)
        return torch.stack(norms).square().sum()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        for part in tensor.detach().reshape(-1).split(_PART):
            part = part.double()
            total += torch.dot(part, part)
    return total


def clip_gradients(parameters: Sequence[Tensor], limit: float, norm: Tensor) -> None:
    """Scale gradients down to a norm of at most `limit`.

    Args:
        parameters: whose `grad` to scale; those without one are left out.
        limit: largest norm; 0 means no clipping.
        norm: the norm of the whole gradient, a scalar. If it is not finite, neither are the
            gradients afterwards.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if limit > 0 and gradients:
        factor = (limit / (norm.double() + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor.float())
