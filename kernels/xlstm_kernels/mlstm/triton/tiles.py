"""Sizes of tiles by architecture, head dimension and dtype: a table, no search at run time."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from xlstm_kernels.common.device_limits import SMALL_SHARED

CHUNK_SIZES = (16, 32, 64, 128, 256)
MOST_QK, MOST_V = 1024, 1024
PROGRAMS = 132  # of the largest GPU in use: fewer programs than this leave parts of it idle
LARGEST_BLOCK = 256
STATE_TILE = 64, 128  # of queries and values, at most: what a program of the state pass carries


class Tile(NamedTuple):
    """Tile sizes of one kernel: tokens, width of the summed axis, width of the result."""

    tokens: int
    inner: int
    width: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class MlstmConfig:
    """Tile sizes of the mLSTM kernels. Make one by `mlstm_config`; override by `replace`.

    `states`: width is that of v, inner that of qk. `outputs` (h), `values` (dv), `keys` (dq, dk).
    """

    states: Tile
    outputs: Tile
    values: Tile
    keys: Tile

    def flat(self) -> list[int]:
        """All numbers in a row, as custom ops can take them."""
        return [number for field in fields(self) for number in getattr(self, field.name)]

    @staticmethod
    def unflat(numbers: list[int]) -> "MlstmConfig":
        """The inverse of `flat`."""
        groups = [Tile(*numbers[i : i + 5]) for i in range(0, len(numbers), 5)]
        return MlstmConfig(*groups)


def power_of_two(x: int) -> int:
    """Smallest power of two that is at least x."""
    return 1 << max(x - 1, 0).bit_length()


def block(dim: int, most: int) -> int:
    """Widest block up to `most` that pads `dim` by at most a sixth, or a block of 32 or 16."""
    width = min(power_of_two(dim), most)
    while width > 32 and -(-dim // width) * width * 6 > dim * 7:
        width //= 2
    return max(width, 16)


def default_chunk_size(qk_dim: int, v_dim: int) -> int:
    """Tokens in a chunk: large heads have large states, which are worth storing less often."""
    return 256 if qk_dim * v_dim >= 128 * 256 else 128 if qk_dim * v_dim >= 64 * 64 else 64


def pick_chunk_size(chunk_size: int | None, rows: int, s: int, qk_dim: int, v_dim: int) -> int:
    """Chunk size for b * heads = `rows` sequences of s tokens: a power of two, as asked or less.

    Outputs and gradients have programs for every tile of tokens, whatever the chunk. The pass over
    states has one for a tile of the state and a segment of chunks. So the chunk is smaller unasked,
    but not below 64, where tiles of the state times chunks would not fill a large GPU.
    """
    most = chunk_size or default_chunk_size(qk_dim, v_dim)
    picked = CHUNK_SIZES[0]
    for size in CHUNK_SIZES[1:]:  # comparisons only: s may be symbolic
        if size <= most and picked < s:
            picked = size
    rows *= -(-qk_dim // STATE_TILE[0]) * -(-v_dim // STATE_TILE[1])
    while chunk_size is None and picked > 64 and rows * s <= (PROGRAMS - 1) * picked:
        picked //= 2
    return picked


def mlstm_config(
    arch: str, qk_dim: int, v_dim: int, dtype: torch.dtype, chunk: int, bf16_states: bool
) -> MlstmConfig:
    """The table: `arch` is "sm_90", "gfx942" and so on."""
    if dtype == torch.float32:  # the exact mode: products in three parts, small tiles
        tokens = min(32, chunk)
        wide = Tile(tokens, block(qk_dim, 32), block(v_dim, 64), 8, 2)
        return MlstmConfig(
            states=Tile(tokens, block(qk_dim, 32), block(v_dim, 32), 4, 3),
            outputs=wide,
            values=wide,
            keys=Tile(tokens, block(v_dim, 16), block(qk_dim, 64), 8, 2),
        )
    tokens = min(64, chunk)
    if arch.startswith("gfx") or arch in SMALL_SHARED:
        narrow = Tile(tokens, block(qk_dim, 64), block(v_dim, 64), 4, 2)
        return MlstmConfig(
            states=narrow,
            outputs=narrow,
            values=narrow,
            keys=Tile(tokens, block(v_dim, 64), block(qk_dim, 64), 8, 2),
        )
    wide = Tile(tokens, block(qk_dim, STATE_TILE[0]), block(v_dim, STATE_TILE[1]), 8, 3)
    narrow = Tile(tokens, block(qk_dim, 64), block(v_dim, 64), 8, 3)
    # Where tensor cores read registers only, a wide tile costs more of them than a tall one.
    tall = Tile(tokens, block(qk_dim, 128), block(v_dim, 64), 8, 3)
    older = arch == "sm_80"
    rows = narrow if older and bf16_states else wide
    if v_dim > 512 and not older:
        # Each tile of a row multiplies all its pairs of tokens again: large heads pay by half as
        # many. Float32 states fill shared memory sooner.
        rows = Tile(tokens, block(qk_dim, 64 if bf16_states else 32), block(v_dim, 256), 8, 2)
    return MlstmConfig(
        states=wide if not older else tall if qk_dim <= 256 else narrow,
        outputs=rows,
        values=rows,
        keys=Tile(tokens, block(v_dim, 128 if bf16_states else 64), block(qk_dim, 128), 8, 2),
    )


def segments(tiles: int, chunks: int) -> int:
    """How many segments the sequence is cut into, so that `tiles` programs each fill a GPU.

    One more than needed, since the first pass over segments leaves the last one out.
    """
    if tiles * 8 >= PROGRAMS * 7:
        return 1
    pieces = min(-(-PROGRAMS // tiles) + 1, chunks)
    return pieces if pieces > 2 else 1
