"""Small parts shared by the blocks: norms, feed-forward, and the ways in and out of TP regions."""

import copy

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.megatron import cpu_runtime
from xlstm_mcore.parallel.tensor import TensorParallelRegion
from xlstm_mcore.parameters.slices import ParameterSlice, attach, packed


def input_projection(
    config: XLSTMConfig,
    region: TensorParallelRegion,
    names: list[str],
    widths: list[int],
) -> ColumnParallelLinear:
    """Several bias-free projections of the same, already gathered input as one matrix product.

    Args:
        names: global names of the projections' weights.
        widths: their global output widths; each must divide by the tensor-parallel size.

    Returns:
        A Megatron layer `[s, b, h] -> [s, b, sum(widths)/tp]`; its rows are this rank's rows of
        the first projection, then of the second, and so on.
    """
    inside = copy.copy(config)
    inside.sequence_parallel = False  # the mixer has gathered the input once for all projections
    linear = ColumnParallelLinear(
        config.hidden_size,
        sum(widths),
        config=inside,
        init_method=config.init_method,
        bias=False,
        disable_grad_reduce=True,  # TensorParallelRegion.gather's backward reduces
        tp_group=region.group,
    )
    shapes = [(width, config.hidden_size) for width in widths]
    slices = packed(names, shapes, shard_dim=0, rank=region.rank, size=region.size)
    attach(linear.weight, slices)
    return linear


def output_projection(
    config: XLSTMConfig, region: TensorParallelRegion, name: str, width: int
) -> RowParallelLinear:
    """The projection back to the residual stream, `[s, b, width/tp] -> [s(/tp), b, h]`."""
    linear = RowParallelLinear(
        width,
        config.hidden_size,
        config=config,
        init_method=config.output_layer_init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=region.group,
    )
    shapes = [(config.hidden_size, width)]
    attach(linear.weight, packed([name], shapes, shard_dim=1, rank=region.rank, size=region.size))
    return linear


def parameter(
    config: XLSTMConfig, shape: tuple[int, ...], slices: list[ParameterSlice]
) -> nn.Parameter:
    """An uninitialised parameter on the model's device with its slices attached."""
    weight = nn.Parameter(
        torch.empty(shape, dtype=config.params_dtype, device=cpu_runtime.device())
    )
    attach(weight, slices, sequence_parallel=config.sequence_parallel)
    return weight


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(x / cap)` (xLSTM 7B, section 3); `None` leaves x as it is."""
    return x if cap is None else cap * torch.tanh(x / cap)
