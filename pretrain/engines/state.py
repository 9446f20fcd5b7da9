"""From what a rank holds of a parameter to the rectangles of the checkpoint.

Optimizers that split state over data-parallel ranks own flat ranges of parameters; the checkpoint
holds rectangles of canonical tensors (`xlstm_mcore.parameters.pieces`). Every engine saves and
loads through these two functions, so what one engine wrote another reads.
"""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from pretrain.checkpoint import Chunk
from xlstm_mcore.parameters.pieces import Piece, rectangles

# Key in the file -> key in torch's Adam; "param" is the fp32 master weight.
OPTIMIZER_STATE = ("param", "exp_avg", "exp_avg_sq")


def optimizer_prefix(key: str) -> str:
    """Prefix of a canonical name for one kind of optimizer state, one of `OPTIMIZER_STATE`."""
    return f"optimizer.state.{key}."


def weight_chunks(parameter: Tensor, pieces: Sequence[Piece]) -> list[Chunk]:
    """The rectangles of a whole local parameter."""
    return [
        Chunk(piece.name, piece.global_shape, piece.global_offset, piece.local(parameter.detach()))
        for piece in pieces
    ]


def shard_chunks(
    pieces: Sequence[Piece],
    shape: Sequence[int],
    shard: Tensor,
    start: int,
    end: int,
    prefix: str = "",
) -> Iterator[Chunk]:
    """Cut the flat range ``[start, end)`` of a parameter along rectangles and pieces.

    Args:
        pieces: where the parameter lies in canonical tensors.
        shape: the local parameter's shape.
        shard: flat tensor of ``end - start`` elements; the chunks are views of it.
        start: first element of the range in the flattened local parameter.
        end: element after the last.
        prefix: put before the canonical names, see :func:`optimizer_prefix`.
    """
    for offset, size, flat in rectangles(shape, start, end):
        block = shard[flat - start : flat - start + math.prod(size)].view(size)
        for piece in pieces:
            low = [max(a, b) for a, b in zip(offset, piece.local_offset, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(offset, size, piece.local_offset, piece.shape, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            inside = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            place = tuple(
                g + a - b
                for g, a, b in zip(piece.global_offset, low, piece.local_offset, strict=True)
            )
            yield Chunk(prefix + piece.name, piece.global_shape, place, block[inside])
