"""The linear projections into and out of a tensor-parallel region."""

import copy

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.parallel.tensor import TensorParallelRegion
from xlstm_mcore.parameters.slices import set_slices, stacked_slices


def input_projection(
    config: XLSTMConfig, region: TensorParallelRegion, names: list[str], widths: list[int]
) -> ColumnParallelLinear:
    """Several bias-free projections of the same, already gathered input as one matrix product.

    Args:
        config: The model's configuration.
        region: The tensor-parallel region.
        names: Global names of the projections' weights.
        widths: Their global output widths; the tensor-parallel size divides each.

    Returns:
        A Megatron layer `[s, b, h] -> [s, b, sum(widths)/tp]`. Its rows are this rank's rows of
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
    slices = stacked_slices(names, shapes, shard_dim=0, rank=region.rank, size=region.size)
    set_slices(linear.weight, slices)
    return linear


def output_projection(
    config: XLSTMConfig, region: TensorParallelRegion, name: str, width: int
) -> RowParallelLinear:
    """The projection back to the residual stream, `[s, b, width/tp] -> [s(/tp), b, h]`.

    Args:
        config: The model's configuration.
        region: The tensor-parallel region.
        name: Global name of the weight.
        width: Global input width; the tensor-parallel size divides it.
    """
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
    slices = stacked_slices([name], shapes, shard_dim=1, rank=region.rank, size=region.size)
    set_slices(linear.weight, slices)
    return linear
