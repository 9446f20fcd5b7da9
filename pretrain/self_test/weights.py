"""Weights for a comparison: away from the special values that they have at the start.

A norm's weight of one, a bias of zero, an input gate that is nearly closed hide mistakes: a factor
that is forgotten is one, a gradient that is not summed is zero.
"""

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.checkpoint import TensorSlice
from pretrain.engines.base import Engine
from pretrain.engines.state import MASTER
from xlstm_io.checkpoint.manifest import OPTIMIZER_PREFIX

NOISE = 0.1  # added to weights of up to WIDTH inputs; less where more inputs add up
WIDTH = 64
LEAST_IGATE_BIAS = -1.0


def noise(name: str, shape: Sequence[int]) -> Tensor:
    """What is added to a global tensor, as a function of its name.

    Args:
        name: the global name.
        shape: the global shape.
    """
    rng = torch.Generator().manual_seed(sum(name.encode()))
    scale = NOISE * math.sqrt(WIDTH / max(WIDTH, shape[-1] if len(shape) > 1 else 1))
    return scale * torch.randn(tuple(shape), generator=rng)


def move_weights(engine: Engine, nudge: float = 0.0) -> None:
    """Add `noise` to weights and master weights, and empty the moments; called by all ranks.

    Args:
        engine: has its initial weights.
        nudge: also change every weight by up to this share of it.
    """

    def fill(slices: list[TensorSlice]) -> None:
        # Computed before anything is written: in fp32 a master weight may be the weight itself.
        values = [_moved(part, nudge) for part in slices]
        for part, value in zip(slices, values, strict=True):
            part.tensor.detach().copy_(value)

    engine.load_sharded_state(fill, 0)


def _moved(part: TensorSlice, nudge: float) -> Tensor:
    name = part.name.removeprefix(MASTER)
    if name.startswith(OPTIMIZER_PREFIX):
        return torch.zeros_like(part.tensor)
    place = tuple(
        slice(o, o + n) for o, n in zip(part.global_offset, part.tensor.shape, strict=True)
    )
    value = part.tensor.detach().float().cpu() + noise(name, part.global_shape)[place]
    if name.endswith("igate.bias"):
        value.clamp_(min=LEAST_IGATE_BIAS)
    if nudge:
        rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        signs = 2 * torch.rand(part.global_shape, generator=rng) - 1
        value *= 1 + nudge * signs[place]
    return value
