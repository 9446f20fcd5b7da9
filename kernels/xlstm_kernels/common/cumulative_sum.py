"""A cumulative sum that is deterministic on every device."""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128


def cumulative_sum(x: Tensor) -> Tensor:
    """Deterministic cumulative sum of `x` [..., n], finite and floating, over its last axis.

    For floats on GPUs torch.cumsum is not deterministic, and raises under
    `torch.use_deterministic_algorithms(True)`. There, blocks of 128 are multiplied with a triangle
    of ones, and the sums of the blocks added.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(-1)
    length = x.shape[-1]
    block = max(1, min(BLOCK, length))
    blocks = pad(x, (0, -length % block)).unflatten(-1, (-1, block))
    sums = blocks @ x.new_ones(block, block).triu()
    if sums.shape[-2] > 1:
        sums = sums + pad(cumulative_sum(sums[..., :-1, -1]), (1, 0))[..., None]
    return sums.flatten(-2)[..., :length]
