"""Cumulative sums that also exist where torch is asked for the same bits every time."""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128


def running_sum(x: Tensor) -> Tensor:
    """Cumulative sum of `x [..., n]`, finite and floating, over its last axis.

    torch's own for floats raises on GPUs under `torch.use_deterministic_algorithms(True)`. There,
    blocks of 128 are multiplied with a triangle of ones, and the sums of the blocks added.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(-1)
    length = x.shape[-1]
    block = max(1, min(BLOCK, length))
    blocks = pad(x, (0, -length % block)).unflatten(-1, (-1, block))
    sums = blocks @ x.new_ones(block, block).triu()
    if sums.shape[-2] > 1:
        sums = sums + pad(running_sum(sums[..., :-1, -1]), (1, 0))[..., None]
    return sums.flatten(-2)[..., :length]
