"""The sLSTM on the CPU as two compiled loops (`loops`), behind custom ops with registered autograd.

Float32 arithmetic for every input but float64, which the torch backend runs. Heads and blocks of
rows go to as many threads as torch uses. Needs the extra `cpu` (Numba); compiled code is kept on
disk, so only the first call on a machine waits some seconds.
"""

import torch
from torch import Tensor

from xlstm_kernels.common.numba.tasks import run_tasks
from xlstm_kernels.slstm.operator import Gradients, Kept, PartialState, Results, scan_operator


def unsupported_reason(
    like: Tensor, *, d: int, asked: bool, cell: str = "slstm", batch: int = 1, heads: int = 1
) -> str | None:
    """Why this backend cannot run such a call, with the remedy; None if it can.

    Any number of rows and heads will do.
    """
    if like.device.type != "cpu":
        return f"the compiled loops run on the CPU, not on {like.device.type}; use another backend"
    if like.dtype == torch.float64:
        return "the compiled loops compute in float32, not float64; convert, or use 'torch'"
    return None


def _padded_weight(recurrent_weight: Tensor, width: int) -> Tensor:
    """[heads, d_in, 4, d_out] in float32 with zeros up to `width` in both dimensions."""
    _, heads, d, _ = recurrent_weight.shape
    padded = recurrent_weight.new_zeros(heads, width, 4, width, dtype=torch.float32)
    padded[:, :d, :, :d] = recurrent_weight.permute(1, 2, 0, 3)
    return padded


def _tiles(matrix: Tensor, tile: int) -> Tensor:
    """[heads, inner, columns] as [heads, columns / tile, inner, tile], read front to back."""
    return matrix.unflatten(2, (-1, tile)).transpose(1, 2).contiguous()


def _shapes(gate_preacts: Tensor) -> tuple[int, int, int, int, int]:
    """Batch, steps, heads, d, and d rounded up to whole tiles."""
    from xlstm_kernels.slstm.numba.loops import TILE

    b, s, _, heads, d = gate_preacts.shape
    return b, s, heads, d, -(-d // TILE) * TILE


def _per_head(x: Tensor | None, heads: int, b: int, d: int, width: int) -> Tensor:
    """A state part [b, heads, d] as [heads, b, width] in float32; zeros for None."""
    padded = torch.zeros(heads, b, width)
    if x is not None:
        padded[:, :, :d] = x.transpose(0, 1)
    return padded


def _starts(boundaries: Tensor | None, b: int, s: int) -> Tensor:
    if boundaries is None:
        return torch.zeros(b, s, dtype=torch.uint8)
    return boundaries.contiguous().view(torch.uint8)


def allocate(gate_preacts: Tensor, cell: str) -> Results:
    """Fresh tensors for the results; for what is saved see `loops.forward`."""
    b, s, heads, d, width = _shapes(gate_preacts)
    new = gate_preacts.new_empty
    wide = {"dtype": torch.float32}
    last = tuple(new(b, heads, d, **wide) for _ in range(4))
    slots = 4 if cell == "slstm" else 5
    acts, decays = new(heads, b, s, slots, width, **wide), new(heads, b, s, width, **wide)
    states = [new(heads, b, s + 1, width, **wide) for _ in range(3)]
    return Results(new(b, s, heads, d), last, [acts, decays, *states])


def forward(
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    state: PartialState,
    boundaries: Tensor | None,
    sigmoid_forget: bool,
    cell: str,
) -> Results:
    """The forward pass; see `slstm_scan` and `loops.forward`."""
    from xlstm_kernels.slstm.numba import loops

    b, s, heads, d, width = _shapes(gate_preacts)
    results = allocate(gate_preacts, cell)
    out, (acts, decays, hs, cs, ns) = results.out, results.saved
    for buffer, x in zip((hs, cs, ns), state[:3], strict=True):
        buffer[:, :, 0] = _per_head(x, heads, b, d, width)
    ms = _per_head(state[3], heads, b, d, width).masked_fill_(ns[:, :, 0] == 0, -torch.inf)
    matrix = _padded_weight(recurrent_weight, width).flatten(2)
    wide = out if out.dtype == torch.float32 else out.float()
    run_tasks(
        loops.forward, heads * -(-b // loops.ROWS),
        b, s, heads, d, width, acts.shape[3], sigmoid_forget, cell == "lstm",
        gate_preacts.float().contiguous(), bias.float().contiguous(),
        _tiles(matrix, loops.TILE), _starts(boundaries, b, s),
        ms.new_empty(heads, b, 4, width), acts, decays, hs, cs, ns, ms, wide,
    )  # fmt: skip
    if wide is not out:
        out.copy_(wide)
    for part, x in zip(results.last, (hs[:, :, s], cs[:, :, s], ns[:, :, s], ms), strict=True):
        part.copy_(x[..., :d].transpose(0, 1))
    return results


def allocate_gradients(kept: Kept) -> Gradients:
    """Fresh tensors for the gradients, all float32."""
    acts = kept.saved[0]
    heads, b, s, _, _ = acts.shape
    d = kept.recurrent_weight.shape[-1]
    d_weight = torch.empty_like(kept.recurrent_weight, dtype=torch.float32)
    d_states = [acts.new_empty(b, heads, d) for _ in range(3)]
    d_preacts, d_bias = acts.new_empty(b, s, 4, heads, d), acts.new_empty(4, heads, d)
    return Gradients(d_preacts, d_weight, d_bias, *d_states)


def backward(
    kept: Kept, d_out: Tensor | None, d_last: PartialState, sigmoid_forget: bool, cell: str
) -> Gradients:
    """The backward pass. The derivatives of both gates are in what was saved."""
    from xlstm_kernels.slstm.numba import loops

    recurrent_weight, (acts, decays, hs, cs, ns) = kept.recurrent_weight, kept.saved
    heads, b, s, _, width = acts.shape
    d = recurrent_weight.shape[-1]
    d_preacts = acts.new_empty(b, s, 4, heads, d)
    if d_out is None:
        d_out = acts.new_zeros(b, s, heads, d)
    matrix = _padded_weight(recurrent_weight, width).permute(0, 2, 3, 1).flatten(1, 2)
    d_states = [_per_head(x, heads, b, d, width) for x in d_last]
    run_tasks(
        loops.backward, heads * -(-b // loops.ROWS),
        b, s, heads, d, width, acts.shape[3], cell == "lstm",
        d_out.float().contiguous(), _tiles(matrix, loops.TILE), _starts(kept.boundaries, b, s),
        acts, decays, cs, ns, *d_states, acts.new_empty(heads, b, 4, width), d_preacts,
    )  # fmt: skip
    # The gradient of the recurrent weight is one product over all steps for each gate.
    h_prev = hs[:, :, :s, :d].reshape(heads, b * s, d)
    d_weight = torch.empty_like(recurrent_weight, dtype=torch.float32)
    for gate in range(4):
        d_gate = d_preacts.view(b * s, 4, heads, d)[:, gate].transpose(0, 1)
        torch.bmm(h_prev.mT, d_gate, out=d_weight[gate])
    d_bias = d_preacts.sum((0, 1))
    d_states = [x[..., :d].transpose(0, 1).contiguous() for x in d_states]
    return Gradients(d_preacts, d_weight, d_bias, *d_states)


scan_forward = scan_operator(
    "slstm_scan_cpu",
    forward=forward,
    allocate=allocate,
    backward=backward,
    allocate_gradients=allocate_gradients,
)
