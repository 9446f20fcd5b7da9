"""Options, sizes and tensors of one call of the mLSTM on Triton, on any device."""

from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.mlstm.arguments import Gradients, Inputs, State
from xlstm_kernels.mlstm.triton.gates import GATE_PLANES
from xlstm_kernels.mlstm.triton.tiles import LARGEST_BLOCK, MlstmConfig


class Options(NamedTuple):
    """What a pass depends on beside its tensors."""

    chunk_size: int
    exp_gate: bool
    normalize: bool
    eps: float
    bf16_states: bool
    precision: str  # of float32 products
    tiles: MlstmConfig
    soft_cap: float | None = None  # of gate pre-activations

    def cap_arguments(self) -> dict[str, object]:
        """The soft cap, by the names of the kernels' parameters."""
        return {"cap": self.soft_cap or 0.0, "CAPPED": self.soft_cap is not None}


class Sizes(NamedTuple):
    """Sizes of one call; T = chunks * L tokens with padding."""

    b: int
    heads: int
    s: int
    qk: int
    v: int
    L: int
    chunks: int

    @property
    def rows(self) -> int:
        """Independent recurrences."""
        return self.b * self.heads

    @property
    def padded(self) -> int:
        """T, the tokens of a row with padding."""
        return self.chunks * self.L

    @property
    def plane(self) -> int:
        """Elements of one padded vector over time, all rows."""
        return self.rows * self.padded

    def arguments(self) -> dict[str, int]:
        """What every kernel but that of the normalizer's gradient takes, by name."""
        names = {"heads": self.heads, "s": self.s, "chunks": self.chunks, "plane": self.plane}
        return names | {"L": self.L}


def sizes_of(q: Tensor, v: Tensor, chunk_size: int) -> Sizes:
    """Sizes of a call with these inputs."""
    b, heads, s, qk = q.shape
    return Sizes(b, heads, s, qk, v.shape[-1], chunk_size, -(-s // chunk_size))


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides over batch, heads and time, by the names of the kernels' parameters."""
    return {
        f"stride_{prefix}{axis}": x.stride(i)
        for prefix, x in tensors.items()
        for i, axis in enumerate("bhs")
    }


def readable(x: Tensor) -> Tensor:
    """`x` itself if the kernels can address it: unit stride last, a tile within 2^31 elements."""
    if x.stride(-1) == 1 and all(y >= 0 for y in x.stride()):
        if x.stride(-2) * LARGEST_BLOCK < 2**31:
            return x
    return x.contiguous()


class ChunkStates(NamedTuple):
    """A state for each chunk, or its gradient."""

    C: Tensor  # [rows, chunks, qk, v]
    n: Tensor  # float32 [rows, chunks, qk]


class Saved(NamedTuple):
    """What the backward pass needs beside the inputs and h. Vectors over time have T tokens."""

    gates: Tensor  # float32 [planes, rows, T]
    g_bar: Tensor  # float32 [rows, chunks] decay of the state over each chunk
    first: Tensor  # int32 [rows, T], or empty without boundaries
    C_before: Tensor  # [rows, chunks, qk, v] state before each chunk
    n_before: Tensor  # float32 [rows, chunks, qk]

    @property
    def bounded(self) -> bool:
        """Whether there are document boundaries."""
        return self.first.numel() > 0


def allocate_forward(
    q: Tensor, z: Sizes, *, bf16_states: bool, bounded: bool, need_last: bool
) -> tuple[Tensor, State | tuple[None, None, None], Saved]:
    """Fresh tensors for h, the last state and `Saved`.

    h [b, heads, s, v] has the dtype of q. The last state is float32: C [rows, qk, v], n [rows, qk],
    m [rows]; they are None unless they are asked for.
    """

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=q.device)

    rows = z.rows
    h = new(z.b, z.heads, z.s, z.v, dtype=q.dtype)
    last = None, None, None
    if need_last:
        last = new(rows, z.qk, z.v), new(rows, z.qk), new(rows)
    states_dtype = torch.bfloat16 if bf16_states else torch.float32
    saved = Saved(
        gates=new(GATE_PLANES, rows, z.padded),
        g_bar=new(rows, z.chunks),
        first=new(rows, z.padded, dtype=torch.int32) if bounded else new(0, dtype=torch.int32),
        C_before=new(rows, z.chunks, z.qk, z.v, dtype=states_dtype),
        n_before=new(rows, z.chunks, z.qk),
    )
    return h, last, saved


def _laid_out_as(x: Tensor) -> Tensor:
    """A fresh tensor like x [b, heads, s, d], its heads beside each other where those of x are."""
    b, heads, s, d = x.shape
    if x.stride(1) >= x.stride(2):
        strides = heads * s * d, s * d, d, 1
    elif x.stride(0) < x.stride(2) and b * heads * d * LARGEST_BLOCK < 2**31:  # as `readable`
        strides = heads * d, d, b * heads * d, 1
    else:
        strides = s * heads * d, d, heads * d, 1
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def allocate_gradients(inputs: Inputs, need_state: bool) -> Gradients:
    """Fresh tensors for all gradients.

    Those of q, k and v lie as q and v do: what made these reads their gradients without a copy. dC
    [rows, qk, v] and dn [rows, qk] are float32, and None unless `need_state`.
    """
    q, _, v, igate, fgate = inputs
    b, heads, s, qk = q.shape

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=q.device)

    rows, v_dim = b * heads, v.shape[-1]
    return Gradients(
        dq=_laid_out_as(q),
        dk=_laid_out_as(q),
        dv=_laid_out_as(v),
        d_igate=new(b, heads, s, dtype=igate.dtype),
        d_fgate=new(b, heads, s, dtype=fgate.dtype),
        dC=new(rows, qk, v_dim) if need_state else None,
        dn=new(rows, qk) if need_state else None,
    )
