"""The classic mLSTM mixer (xLSTM, arXiv 2405.04517, figure 11), tensor parallel by heads.

Pre up-projection, causal convolution, block-diagonal q, k, v, gates that see all heads, a learnable
skip and an output gate. The gates are the only place where heads meet: each rank adds its columns'
part, and one small sum over ranks (2 numbers per head and token) completes them. Context parallel
ranks pass the cell's state (parallel/mlstm_state.py) and the convolution's last inputs.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.mixers.kernel_calls import run_conv, run_head_norm, run_mlstm
from xlstm_mcore.modules.linear import input_projection, output_projection, parameter
from xlstm_mcore.parallel.context import ContextParallel
from xlstm_mcore.parallel.tensor import TensorParallelRegion
from xlstm_mcore.parameters.slices import ParameterSlice, packed
from xlstm_mcore.recompute import recompute_in_backward, regather_in_backward

TILE = 32  # of a block-diagonal map; measured on CPUs, and two tensor-core tiles


class ClassicMLSTMMixer(nn.Module):
    """Classic mLSTM with pre up-projection.

    Args:
        config: the model's configuration.
        pg_collection: process groups (`tp` and `cp` are read).
        prefix: canonical prefix of the parameters' names, `decoder.layers.N.mixer.`.
    """

    def __init__(
        self, config: XLSTMConfig, pg_collection: ProcessGroupCollection, prefix: str
    ) -> None:
        super().__init__()
        self.config = config
        self.region = region = TensorParallelRegion(config, pg_collection.tp)
        self.context = ContextParallel(pg_collection.cp)
        inner, heads, block = config.up_dim, config.num_heads, config.qkv_block_size
        self.inner, self.num_heads = inner // region.size, heads // region.size
        self.head_dim = inner // heads
        shard = {"shard_dim": 0, "rank": region.rank, "size": region.size}

        names = [f"{prefix}up_proj.weight", f"{prefix}z_proj.weight"]
        self.in_proj = input_projection(config, region, names, [inner, inner])
        self.conv_weight = self.conv_bias = None
        if config.conv_width:
            self.conv_weight = parameter(
                config,
                (self.inner, config.conv_width),
                packed([f"{prefix}conv.weight"], [(inner, config.conv_width)], **shard),
            )
            self.conv_bias = parameter(
                config, (self.inner,), packed([f"{prefix}conv.bias"], [(inner,)], **shard)
            )
        # [q blocks, k blocks, v blocks], each block (out, in)
        blocks = inner // block
        self.qkv_weight = parameter(
            config,
            (3 * blocks // region.size, block, block),
            packed(
                [f"{prefix}{n}_proj.weight" for n in "qkv"], [(blocks, block, block)] * 3, **shard
            ),
        )
        self.igate_weight = self._gate_weight(f"{prefix}igate.weight")
        self.fgate_weight = self._gate_weight(f"{prefix}fgate.weight")
        self.gate_bias = parameter(
            config,
            (2 * self.num_heads,),
            packed([f"{prefix}{g}.bias" for g in ("igate", "fgate")], [(heads,)] * 2, **shard),
        )
        for name, attribute in (
            ("head_norm.weight", "head_norm_weight"),
            ("learnable_skip", "learnable_skip"),
        ):
            slices = packed([f"{prefix}{name}"], [(inner,)], **shard)
            setattr(self, attribute, parameter(config, (self.inner,), slices))
        self.out_proj = output_projection(config, region, f"{prefix}out_proj.weight", inner)

    def _gate_weight(self, name: str) -> nn.Parameter:
        """Weight `[heads, 3 * inner]` of a gate, of which a rank holds its q, k, v columns."""
        heads, inner, mine = self.config.num_heads, self.config.up_dim, self.inner
        slices = [
            ParameterSlice(
                name,
                (heads, 3 * inner),
                (0, part * inner + self.region.rank * mine),
                (0, part * mine),
                (heads, mine),
            )
            for part in range(3)
        ]
        return parameter(self.config, (heads, 3 * mine), slices)

    def forward(self, x: Tensor, boundaries: Tensor | None, cache: dict | None = None) -> Tensor:
        """Mix along the sequence: `x [s(/cp/tp), b, h]` to the same shape.

        Args:
            x: this rank's positions.
            boundaries: bool `[b, s]` of the whole row, True at the first token of a document, or
                None.
            cache: state of this layer between calls when generating; read and updated.
        """
        x = regather_in_backward(self.region.gather, x)
        x_m, z = self.in_proj(x)[0].transpose(0, 1).chunk(2, dim=-1)  # [b, s, inner]
        x_c = run_conv(
            self.config, x_m, self.conv_weight, self.conv_bias, boundaries, cache, self.context
        )
        q, k, v = (
            block_diagonal(source, weight, self.num_heads)
            for source, weight in zip((x_c, x_c, x_m), self.qkv_weight.chunk(3), strict=True)
        )
        igate, fgate = self._gates(q, k, v)
        h = run_mlstm(self.config, q, k, v, igate, fgate, boundaries, cache, self.context)
        h = recompute_in_backward(
            self._output, h, self.head_norm_weight, self.learnable_skip, x_c, z
        )
        return self.out_proj(h.transpose(0, 1))[0]

    def _output(self, h: Tensor, norm_weight: Tensor, skip: Tensor, x_c: Tensor, z: Tensor):
        """`(norm(h) + skip * x_c) * silu(z)`, `[b, s, inner]`: `h [b, heads, s, d]`."""
        h = run_head_norm(self.config, h.transpose(1, 2), norm_weight)
        return (h.reshape(x_c.shape) + skip * x_c) * F.silu(z)

    def _gates(self, *qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Gates `[b, heads/tp, s]` before activation, from qkv `[b, heads, s, d]`."""
        dtype = torch.promote_types(qkv[0].dtype, torch.float32)
        weight = torch.cat((self.igate_weight, self.fgate_weight)).to(dtype)
        partial = recompute_in_backward(_seen_by_gates, weight, *qkv)
        b, s, _ = partial.shape
        by_head = partial.view(b, s, 2, -1).transpose(2, 3).reshape(b, s, -1)  # i, f of each head
        mine = self.region.sum_and_split(by_head).view(b, s, self.num_heads, 2)
        preacts = mine + self.gate_bias.to(dtype).view(2, self.num_heads).t()
        igate, fgate = preacts.permute(3, 0, 2, 1)
        return igate, fgate


def _seen_by_gates(weight: Tensor, *qkv: Tensor) -> Tensor:
    """What `weight [gates, 3 * heads * d]` makes of qkv `[b, heads, s, d]`: `[b, s, gates]`.

    Head by head, so that nothing of the size of q is copied.
    """
    _, heads, _, d = qkv[0].shape
    columns = weight.view(-1, 3, heads, d).permute(1, 2, 3, 0)  # [3, heads, d, gates]
    parts = (torch.matmul(x.to(weight.dtype), c) for x, c in zip(qkv, columns, strict=True))
    return sum(parts).sum(1)


def block_diagonal(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """A block-diagonal linear map, its result by heads.

    Blocks of 4 x 4 make poor matrix products; several are put into one dense tile, with zeros
    between them.

    Args:
        x: `[b, s, blocks * width]`.
        weight: `[blocks, out, in]` with `in = out = width`.
        heads: number of heads; it divides the number of blocks.

    Returns:
        `[b, heads, s, head_dim]`, contiguous, with `head_dim = blocks * width / heads`.
    """
    blocks, _, width = weight.shape
    b, s, _ = x.shape
    joined = math.gcd(blocks // heads, max(1, TILE // width))
    tiles, tile = blocks // joined, joined * width
    apart = torch.eye(joined, dtype=weight.dtype, device=weight.device).view(joined, 1, joined, 1)
    dense = weight.view(tiles, joined, width, 1, width) * apart  # [tiles, block, out, block, in]
    rows = x.reshape(b * s, tiles, tile).transpose(0, 1)
    product = torch.bmm(rows, dense.view(tiles, tile, tile).mT)
    by_head = product.view(heads, tiles // heads, b, s, tile).permute(2, 0, 3, 1, 4)
    return by_head.reshape(b, heads, s, blocks // heads * width)
