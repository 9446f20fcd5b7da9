"""Block-diagonal maps as dense tiles: blocks of 4 x 4 are too small for fast matrix products."""

import math

import torch
from torch import Tensor

# Width of a dense tile of the block-diagonal maps: the best one measured on CPUs, and the width of
# two tensor-core tiles.
TILE = 32


def joined_blocks(blocks: int, width: int) -> int:
    """How many of a head's blocks are put into one dense tile."""
    return math.gcd(blocks, max(1, TILE // width))


def tiles_of_heads(qkv_weight: Tensor, heads: int) -> Tensor:
    """The blocks of q, k and v [3 * blocks, out, in] as dense tiles, each within one head."""
    blocks, _, width = qkv_weight.shape
    return dense_tiles(qkv_weight, joined_blocks(blocks // 3 // heads, width))


def dense_tiles(weight: Tensor, joined: int) -> Tensor:
    """`weight [blocks, out, in]` as [tiles, tile, tile], `joined` blocks in each, zeros between."""
    blocks, _, width = weight.shape
    tiles, tile = blocks // joined, joined * width
    apart = torch.eye(joined, dtype=weight.dtype, device=weight.device).view(joined, 1, joined, 1)
    dense = weight.view(tiles, joined, width, 1, width) * apart  # [tiles, block, out, block, in]
    return dense.view(tiles, tile, tile)
