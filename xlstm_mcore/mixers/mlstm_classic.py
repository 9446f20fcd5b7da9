"""The classic mLSTM mixer (xLSTM, arXiv 2405.04517, figure 11), tensor parallel by heads.

Pre up-projection, causal convolution, block-diagonal q, k, v, gates that see all heads, a learnable
skip and an output gate. The gates are the only place where heads meet: each rank adds its columns'
part, and one small sum over ranks (2 numbers per head and token) completes them. Context-parallel
ranks pass the cell's state (parallel/mlstm_state.py) and the convolution's last inputs.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.mixers.base import Mixer
from xlstm_mcore.mixers.kernel_calls import gate_weight, run_conv, run_head_norm, run_mlstm
from xlstm_mcore.modules.products import narrow_product
from xlstm_mcore.parameters.slices import ParameterSlice, new_parameter
from xlstm_mcore.recompute import recompute_in_backward, regather_in_backward

# Width of a dense tile of the block-diagonal maps: the best one measured on CPUs, and the width of
# two tensor-core tiles.
TILE = 32


class ClassicMLSTMMixer(Mixer):
    """Classic mLSTM with pre up-projection; see `Mixer` for the arguments."""

    def __init__(
        self, config: XLSTMConfig, pg_collection: ProcessGroupCollection, prefix: str
    ) -> None:
        super().__init__(config, pg_collection, prefix)
        inner, heads, block = config.up_dim, config.num_heads, config.qkv_block_size
        self.inner, self.num_heads = inner // self.region.size, heads // self.region.size
        self.head_dim = inner // heads

        self.in_proj = self.input_projection({"up_proj.weight": inner, "z_proj.weight": inner})
        self.conv_weight = self.conv_bias = None
        if config.conv_width:
            self.conv_weight = self.split_parameter(["conv.weight"], (inner, config.conv_width))
            self.conv_bias = self.split_parameter(["conv.bias"], (inner,))
        # [q blocks, k blocks, v blocks], each block (out, in)
        self.qkv_weight = self.split_parameter(
            [f"{n}_proj.weight" for n in "qkv"], (inner // block, block, block)
        )
        self.igate_weight = self._gate_weight(f"{prefix}igate.weight")
        self.fgate_weight = self._gate_weight(f"{prefix}fgate.weight")
        self.gate_bias = self.split_parameter(["igate.bias", "fgate.bias"], (heads,))
        self.head_norm_weight = self.split_parameter(["head_norm.weight"], (inner,))
        self.learnable_skip = self.split_parameter(["learnable_skip"], (inner,))
        self.out_proj = self.output_projection(inner)

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
        return new_parameter(self.config, slices)

    def forward(self, x: Tensor, boundaries: Tensor | None, cache: dict | None = None) -> Tensor:
        """Mix along the sequence, see `Mixer`."""
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
        h = run_mlstm(
            self.config,
            q,
            k,
            v,
            igate,
            fgate,
            boundaries,
            cache,
            self.context,
            observe=self.observe,
        )
        h = recompute_in_backward(
            self._output, h, self.head_norm_weight, self.learnable_skip, x_c, z
        )
        return self.out_proj(h.transpose(0, 1))[0]

    def _output(
        self, h: Tensor, norm_weight: Tensor, skip: Tensor, x_c: Tensor, z: Tensor
    ) -> Tensor:
        """`(norm(h) + skip * x_c) * silu(z)`, `[b, s, inner]`, of `h [b, heads, s, d]`."""
        h = run_head_norm(self.config, h.transpose(1, 2), norm_weight)
        return (h.reshape(x_c.shape) + skip * x_c) * F.silu(z)

    def _gates(self, *qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations of both gates, `[b, heads/tp, s]`, from q, k, v `[b, heads, s, d]`."""
        dtype = torch.promote_types(qkv[0].dtype, torch.float32)
        both = torch.cat((self.igate_weight, self.fgate_weight))
        weight = gate_weight(self.config, both)
        partial = recompute_in_backward(_project_heads, weight, *qkv)
        b, s, _ = partial.shape
        by_head = partial.view(b, s, 2, -1).transpose(2, 3).reshape(b, s, -1)  # i, f of each head
        mine = self.region.sum_and_split(by_head).view(b, s, self.num_heads, 2)
        preacts = mine + self.gate_bias.to(dtype).view(2, self.num_heads).t()
        igate, fgate = preacts.permute(3, 0, 2, 1)
        return igate, fgate


def _project_heads(weight: Tensor, *qkv: Tensor) -> Tensor:
    """`weight [gates, 3 * heads * d]` times q, k and v `[b, heads, s, d]`, giving `[b, s, gates]`.

    The product is taken in fp32, and of q, k and v as they lie: heads beside each other.
    """
    b = len(qkv[0])
    columns = weight.unflatten(1, (3, -1)).permute(1, 2, 0)  # [3, heads * d, gates]
    parts = (
        narrow_product(x.transpose(1, 2).flatten(2), c.expand(b, -1, -1))
        for x, c in zip(qkv, columns, strict=True)
    )
    return sum(parts)


def block_diagonal(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """A block-diagonal linear map, its result by heads.

    Blocks of 4 x 4 are too small for fast matrix products, so several are put into one dense tile
    with zeros between them.

    Args:
        x: `[b, s, blocks * width]`.
        weight: `[blocks, out, in]` with `in = out = width`.
        heads: Number of heads; it divides the number of blocks.

    Returns:
        `[b, heads, s, head_dim]` with `head_dim = blocks * width / heads`. Tokens lie as those of
        `x`, so that nothing is put in order before the cell or after it.
    """
    blocks, _, width = weight.shape
    joined = math.gcd(blocks // heads, max(1, TILE // width))
    tiles, tile = blocks // joined, joined * width
    apart = torch.eye(joined, dtype=weight.dtype, device=weight.device).view(joined, 1, joined, 1)
    dense = weight.view(tiles, joined, width, 1, width) * apart  # [tiles, block, out, block, in]
    product = _TileProducts.apply(x, dense.view(tiles, tile, tile))
    return product.unflatten(-1, (heads, -1)).transpose(1, 2)


class _TileProducts(torch.autograd.Function):
    """`x [b, s, tiles * tile]` times a matrix `[out, in]` for each tile, in the order of `x`."""

    @staticmethod
    def forward(ctx, x, matrices):
        ctx.save_for_backward(x, matrices)
        out = _empty_like(x)
        tile = matrices.shape[-1]
        torch.bmm(_by_tile(x, tile), matrices.mT, out=_by_tile(out, tile))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, matrices = ctx.saved_tensors
        tile = matrices.shape[-1]
        d_out, d_x = _empty_like(x), _empty_like(x)
        d_out.copy_(grad)
        d_out = _by_tile(d_out, tile)
        torch.bmm(d_out, matrices, out=_by_tile(d_x, tile))
        return d_x, torch.bmm(d_out.mT, _by_tile(x, tile))


def _sequence_first(x: Tensor) -> bool:
    """Whether the tokens of `x [b, s, c]` lie in the order of the sequence, then of the batch."""
    return x.stride(0) < x.stride(1)


def _empty_like(x: Tensor) -> Tensor:
    """A tensor like `x [b, s, c]`, without gaps and in its order of tokens."""
    b, s, c = x.shape
    return x.new_empty(s, b, c).transpose(0, 1) if _sequence_first(x) else x.new_empty(b, s, c)


def _by_tile(x: Tensor, tile: int) -> Tensor:
    """`x [b, s, tiles * tile]` as `[tiles, tokens, tile]`, without a copy."""
    tokens = x.transpose(0, 1) if _sequence_first(x) else x
    return tokens.reshape(-1, x.shape[-1] // tile, tile).transpose(0, 1)
