"""Small parts shared by the blocks: norms, feed-forward, and the ways in and out of TP regions."""

import copy

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from . import cpu_runtime
from .config import XLSTMConfig
from .pieces import Piece, attach, packed
from .recompute import recomputed


class TensorParallelRegion:
    """How a mixer's input enters, and its output leaves, the tensor-parallel region.

    Outside the region activations are ``[s, b, h]`` on every rank, or ``[s/tp, b, h]`` with
    sequence parallelism. Inside, a rank sees the whole sequence and its own heads or channels.
    Each method's backward is the matching adjoint, so gradients need no further reduction.

    Args:
        config: the model's configuration (``sequence_parallel`` is read).
        group: the tensor-parallel process group.
    """

    def __init__(self, config: XLSTMConfig, group: torch.distributed.ProcessGroup) -> None:
        self.group = group
        self.size = group.size()
        self.rank = group.rank()
        self.sequence_parallel = config.sequence_parallel and self.size > 1

    def gather(self, x: Tensor) -> Tensor:
        """All channels at every position: ``[s(/tp), b, h] -> [s, b, h]``."""
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(x, group=self.group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(x, group=self.group)

    def to_heads(self, x: Tensor) -> Tensor:
        """This rank's channels at every position: ``[s(/tp), b, h] -> [s, b, h/tp]``.

        With sequence parallelism this is one all-to-all: nothing is gathered that is not used.
        """
        if self.sequence_parallel:
            s, b, h = x.shape
            out = tensor_parallel.all_to_all_sp2hp(x, group=self.group)
            return out.view(s * self.size, b, h // self.size)
        return tensor_parallel.scatter_to_tensor_model_parallel_region(x, group=self.group)

    def from_heads(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`to_heads`: ``[s, b, h/tp] -> [s(/tp), b, h]``."""
        if self.sequence_parallel:
            s, b, h = x.shape
            out = tensor_parallel.all_to_all_hp2sp(x.reshape(s * b, h), group=self.group)
            return out.view(s // self.size, b, h * self.size)
        return tensor_parallel.gather_from_tensor_model_parallel_region(x, group=self.group)

    def sum_and_split(self, x: Tensor) -> Tensor:
        """Sum partial results over ranks and keep this rank's slice of the last dimension."""
        total = tensor_parallel.reduce_from_tensor_model_parallel_region(x, group=self.group)
        return tensor_parallel.scatter_to_tensor_model_parallel_region(total, group=self.group)


def input_projection(
    config: XLSTMConfig,
    region: TensorParallelRegion,
    names: list[str],
    widths: list[int],
) -> ColumnParallelLinear:
    """Several bias-free projections of the same, already gathered input as one matrix product.

    Args:
        names: canonical names of the projections' weights.
        widths: their global output widths; each must divide by the tensor-parallel size.

    Returns:
        A Megatron layer ``[s, b, h] -> [s, b, sum(widths)/tp]``; its rows are this rank's rows of
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
    pieces = packed(names, shapes, shard_dim=0, rank=region.rank, size=region.size)
    attach(linear.weight, pieces)
    return linear


def output_projection(
    config: XLSTMConfig, region: TensorParallelRegion, name: str, width: int
) -> RowParallelLinear:
    """The projection back to the residual stream, ``[s, b, width/tp] -> [s(/tp), b, h]``."""
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


def parameter(config: XLSTMConfig, shape: tuple[int, ...], pieces: list[Piece]) -> nn.Parameter:
    """An uninitialised parameter on the model's device with its pieces attached."""
    weight = nn.Parameter(
        torch.empty(shape, dtype=config.params_dtype, device=cpu_runtime.device())
    )
    attach(weight, pieces, sequence_parallel=config.sequence_parallel)
    return weight


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, without bias, computed in fp32.

    megatron-core's plain norm refuses sequence parallelism, and its others need Apex or
    TransformerEngine.

    Args:
        config: ``norm`` ("rmsnorm" or "layernorm"), ``norm_eps``, ``hidden_size`` are read.
        name: canonical name of the weight, initialised to ones.
    """

    def __init__(self, config: XLSTMConfig, name: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.kind, self.eps = config.norm, config.norm_eps
        piece = Piece(name, (width,), (0,), (0,), (width,))
        self.weight = parameter(config, (width,), [piece])

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x [..., hidden]``; same shape and dtype."""
        return recomputed(self._normalize, x, self.weight)

    def _normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        shape, weight = weight.shape, weight.to(dtype)
        if self.kind == "layernorm":
            out = F.layer_norm(x.to(dtype), shape, weight, None, self.eps)
        else:
            out = F.rms_norm(x.to(dtype), shape, weight, self.eps)
        return out.to(x.dtype)


class FeedForward(nn.Module):
    """Gated feed-forward ``down(act(gate(x)) * up(x))``: SwiGLU (7B) or GeGLU (classic sLSTM).

    Args:
        config: the model's configuration.
        pg_collection: process groups (``tp`` is read).
        prefix: canonical prefix of the parameters' names.
        width: inner width.
        activation: "silu" or "gelu".
    """

    def __init__(
        self,
        config: XLSTMConfig,
        pg_collection: ProcessGroupCollection,
        prefix: str,
        width: int,
        activation: str,
    ) -> None:
        super().__init__()
        region = TensorParallelRegion(config, pg_collection.tp)
        self.activation = {"silu": F.silu, "gelu": F.gelu}[activation]
        self.linear_fc1 = ColumnParallelLinear(
            config.hidden_size,
            2 * width,
            config=config,
            init_method=config.init_method,
            bias=False,
            tp_group=region.group,
        )
        names = [f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"]
        shapes = [(width, config.hidden_size)] * 2
        attach(
            self.linear_fc1.weight,
            packed(names, shapes, shard_dim=0, rank=region.rank, size=region.size),
        )
        self.linear_fc2 = output_projection(config, region, f"{prefix}down_proj.weight", width)

    def forward(self, x: Tensor) -> Tensor:
        """``[s(/tp), b, h] -> [s(/tp), b, h]``."""
        return self.linear_fc2(recomputed(self._gated, self.linear_fc1(x)[0]))[0]

    def _gated(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate) * up


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)`` (xLSTM 7B, section 3); ``None`` leaves x as it is."""
    return x if cap is None else cap * torch.tanh(x / cap)
