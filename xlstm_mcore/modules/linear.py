"""The linear projections into and out of a tensor-parallel region.

Megatron's layers are the matrix product and what ranks tell each other for it. Where they have
nothing to tell, both classes take the short way: the way through Megatron's autograd functions is a
part of the time that a token takes when text is generated at batch 1, and twenty operators of a
block that trains.
"""

import copy
from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.modules.products import Again, local_product, product_of
from xlstm_mcore.parallel.tensor import TensorParallelRegion
from xlstm_mcore.parameters.slices import set_slices, stacked_slices
from xlstm_mcore.recompute import is_selective, recompute_in_backward


class ColumnLinear(ColumnParallelLinear):
    """Megatron's layer with its rows split over ranks; every rank has the whole input."""

    def forward(self, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, None]:
        """`x [..., h]` to `([..., rows/tp], None)`; `weight` stands in for the layer's own."""
        weight = self.weight if weight is None else weight
        if not self.sequence_parallel:
            if not torch.is_grad_enabled():
                return x @ weight.t(), None
            if self.tp_group.size() == 1 or self.disable_grad_reduce:
                return local_product(x, weight, self.config.gradient_accumulation_fusion), None
        return super().forward(x, weight)


class RowLinear(RowParallelLinear):
    """Megatron's layer with its columns split over ranks, like its input; results are summed."""

    def forward(
        self,
        *inputs: Tensor,
        function: Callable[..., Tensor] | None = None,
        keeps_inputs_only: bool = False,
        again: Again | None = None,
    ) -> tuple[Tensor, None]:
        """`x [s * b, columns/tp]` to `([s(/tp) * b, h], None)`.

        Args:
            inputs: `x`, or what `function` makes `x` of.
            function: See `product_of`; selective recompute does not keep its result.
            keeps_inputs_only: See `recompute_in_backward`.
            again: See `product_of`.
        """
        into_buffer = self.config.gradient_accumulation_fusion
        if function is not None and torch.is_grad_enabled() and is_selective():
            out = product_of(function, inputs, self.weight, into_buffer, again)
        else:
            x = inputs[0]
            if function is not None:
                x = recompute_in_backward(function, *inputs, keeps_inputs_only=keeps_inputs_only)
            if torch.is_grad_enabled():
                out = local_product(x, self.weight, into_buffer)
            else:
                out = x @ self.weight.t()
        if self.sequence_parallel:
            out = reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        elif self.tp_group.size() > 1:
            out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out, None


def input_projection(
    config: XLSTMConfig,
    region: TensorParallelRegion,
    widths: dict[str, int],
    kind: type[ColumnLinear] = ColumnLinear,
    *,
    gathered: bool = True,
) -> ColumnLinear:
    """Several bias-free projections of the same input as one matrix product.

    Args:
        config: The model's configuration.
        region: The tensor-parallel region.
        widths: Global output widths by the global names of the weights; the tensor-parallel size
            divides each.
        kind: What is built.
        gathered: Whether the input comes from `region.gather`, whose backward pass reduces.

    Returns:
        A Megatron layer `[s * b, h] -> [s * b, sum(widths)/tp]`. Its rows are this rank's rows of
        the first projection, then of the second, and so on.
    """
    inside = copy.copy(config)
    inside.sequence_parallel = config.sequence_parallel and not gathered
    linear = kind(
        config.hidden_size,
        sum(widths.values()),
        config=inside,
        init_method=config.init_method,
        bias=False,
        disable_grad_reduce=gathered,
        tp_group=region.group,
    )
    shapes = {name: (width, config.hidden_size) for name, width in widths.items()}
    slices = stacked_slices(shapes, shard_dim=0, rank=region.rank, size=region.size)
    set_slices(linear.weight, slices)
    return linear


def output_projection(
    config: XLSTMConfig, region: TensorParallelRegion, name: str, width: int
) -> RowLinear:
    """The projection back to the residual stream, `[s * b, width/tp] -> [s(/tp) * b, h]`.

    Args:
        config: The model's configuration.
        region: The tensor-parallel region.
        name: Global name of the weight.
        width: Global input width; the tensor-parallel size divides it.
    """
    linear = RowLinear(
        width,
        config.hidden_size,
        config=config,
        init_method=config.output_layer_init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=region.group,
    )
    shapes = {name: (config.hidden_size, width)}
    slices = stacked_slices(shapes, shard_dim=1, rank=region.rank, size=region.size)
    set_slices(linear.weight, slices)
    return linear
