"""The mLSTM's state across context-parallel ranks, exactly, forward and backward.

The state that enters a rank's slice of the sequence follows from the slices before it:

    S_out = keep * S_in + gain * S_own        (C and n alike; exp(m) C is what is carried)

`S_own` is what the slice writes into an empty state: one matrix product `(w k)^T v`, whose weights
w come from the gates. `keep` is the decay over the slice (0 where a document starts in it). So
every rank first computes S_own, then a scan over ranks gives S_in, and then the cell runs once with
the right initial state. The cost is the product, in the model's own type with fp32 sums:
`2 qk_dim v_dim` operations per token and head, a third of the cell's, which is itself about a
hundredth of a 7B model's. Running the cell from zero first and adding the missing part later would
need that product too, and the cell would have to return numerator and denominator separately.

The backward pass is the transpose. The cell gives dL/dS_in of each rank, a scan from the last rank
to the first turns them into dL/dS_out, and the product's gradients complete those of k, v and the
gates (the forget gates through `keep` as well).

There are two ways to scan, with the same result; `gathers` chooses:

- Up to 8 ranks, each gathers all S_own and adds them up: one step, `cp - 1` states received.
- With more ranks, a pipeline along the ranks in slices of the value dimension: each rank receives
  one state and sends one, whatever the sequence and the number of ranks. The last slice arrives
  after `cp + 7` steps of 1/8 state. A slice travels while the next one's product is computed.

m depends on the gates alone, and is the m that one process would have: a rank's m_out is the larger
of `total + m_in` and `best`, the m it would have from an empty state. S_own is kept in units of
exp(best), so that computing it needs nothing of the ranks before.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from xlstm_kernels.common.checks import compute_dtype
from xlstm_kernels.common.cumulative_sum import cumulative_sum
from xlstm_kernels.common.gates import log_forget_gate
from xlstm_kernels.common.products import product_in_fp32
from xlstm_kernels.mlstm.arguments import State

# The number of ranks up to which all gather all states; with more, one state goes along the ranks.
GATHER_UP_TO = 8
SLICES = 8  # of a state, along its value dimension, that go along the ranks one by one


def gathers(ranks: int) -> bool:
    """Whether a group of this size gathers all states instead of passing them along.

    A gather takes the time of `ranks - 1` states and one call, the pipeline that of `ranks + 7`
    messages of 1/8 state. A state is small (0.5 MB per row for a head of the 7B), so the latency
    of messages decides until the gather's bytes, which grow with the ranks, outweigh it. The
    number is an estimate; nothing of this has been timed on GPUs.
    """
    return ranks <= GATHER_UP_TO


def column_slices(v_dim: int) -> list[slice]:
    """The slices of a state's value dimension that travel one by one."""
    step = -(-v_dim // SLICES)
    return [slice(first, min(first + step, v_dim)) for first in range(0, v_dim, step)]


def entering_state(
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    boundaries: Tensor | None,
    group: dist.ProcessGroup,
    *,
    gate: str,
) -> State | None:
    """The state of the mLSTM before this rank's slice, for `mlstm_chunkwise`.

    All ranks of the group must call it in the same order, and run its backward pass too: the first
    rank's state is zero, but it carries gradients.

    Args:
        k: `[b, heads, s/cp, qk_dim]`.
        v: `[b, heads, s/cp, v_dim]`.
        igate_preact: `[b, heads, s/cp]`, soft cap applied.
        fgate_preact: `[b, heads, s/cp]`, soft cap applied.
        boundaries: Bool `[b, s/cp]` of this slice, or None.
        group: The context-parallel group; rank r holds slice r.
        gate: The kind of input gate, "exp" or "sigmoid" (then m is 0).

    Returns:
        `(C [b, heads, qk_dim, v_dim], n [b, heads, qk_dim], m [b, heads])` in fp32 (fp64 for
        fp64 inputs), m without gradient; None in a group of one.
    """
    if group.size() == 1:
        return None
    b, heads, _, qk_dim = k.shape
    gates = _slice_gates(igate_preact, fgate_preact, boundaries, gate == "exp")
    C, n, m = _EnteringState.apply(k, v, *gates, group)
    return C.view(b, heads, qk_dim, -1), n.view(b, heads, qk_dim), m.view(b, heads)


def _slice_gates(
    igate_preact: Tensor, fgate_preact: Tensor, boundaries: Tensor | None, exp_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the gates of a slice say about its state, in fp64 like all gate sums of the kernels.

    Returns:
        `log_write [b, heads, s]`, the log weight of each token in the state after the slice, in
        units of exp(best); `total [b, heads]`, the log decay over the slice (-inf where a
        document starts in it); `best [b, heads]`, m after the slice from an empty state (no
        gradient).
    """
    log_f, log_i = log_forget_gate(fgate_preact), igate_preact.double()
    log_i = log_i if exp_gate else logsigmoid(log_i)
    after = cumulative_sum(pad(log_f[..., 1:], (0, 1)).flip(-1)).flip(-1)  # decay behind each token
    total, log_write = log_f.sum(-1), after + log_i
    fresh = None
    if boundaries is not None:
        document = boundaries.cumsum(1)[:, None]
        forgotten = document != document[..., -1:]
        log_write = log_write.masked_fill(forgotten, -torch.inf)
        total = total.masked_fill(document[..., -1] > 0, -torch.inf)
        # A document starts with m = 0, which decays like any other.
        fresh = (after + log_f).masked_fill(forgotten | ~boundaries[:, None], -torch.inf).detach()
    if not exp_gate:  # m stays 0
        return log_write, total, torch.zeros_like(total)
    best = log_write.detach()
    best = (best if fresh is None else torch.maximum(best, fresh)).amax(-1)
    return log_write - best[..., None], total, best


class _Join(NamedTuple):
    """How a slice continues a state: m after it, and the factors of S_in and S_own; each [N]."""

    m: Tensor
    keep: Tensor
    gain: Tensor


def _join(total: Tensor, best: Tensor, m: Tensor) -> _Join:
    # m is rounded before it is used, so that it belongs to the state that goes with it.
    m_out = torch.maximum(total + m.double(), best).to(m.dtype)
    keep = (total + m.double() - m_out.double()).exp()
    gain = (best - m_out.double()).exp()
    return _Join(m_out, keep.to(m.dtype), gain.to(m.dtype))


class _EnteringState(torch.autograd.Function):
    """k, v, log_write, total, best -> (C [N, qk_dim, v_dim], n [N, qk_dim], m [N]); N = b * heads.

    Saves k and v as they came, and the state.
    """

    @staticmethod
    def forward(ctx, k, v, log_write, total, best, group):
        dtype = compute_dtype(k.dtype)
        total, best = total.flatten(), best.flatten()
        key = _weighted(k, log_write, dtype)
        scan = _gather_states if gathers(group.size()) else _pipeline_states
        state, keep, gain = scan(key, v.flatten(0, 1), total, best, group)
        ctx.save_for_backward(k, v, log_write, *state[:2], keep, gain)
        ctx.group = group
        ctx.mark_non_differentiable(state[2])
        return state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_C, d_n, _):
        k, v, log_write, C, n, keep, gain = ctx.saved_tensors
        group, dtype = ctx.group, C.dtype
        scan = _gather_gradients if gathers(group.size()) else _pipeline_gradients
        gradients = scan(d_C, d_n, keep, group)

        rank = group.rank()
        own_keep, gain = (keep[rank] if keep.dim() == 2 else keep), gain[:, None]
        key, value = _weighted(k, log_write, dtype), v.flatten(0, 1)
        d_after_n = next(gradients)
        d_keep = (n * d_after_n).sum(-1)
        d_key = (gain * d_after_n)[:, None].expand_as(key).contiguous()
        d_v = torch.empty_like(value)
        for columns, d_after in gradients:
            d_keep += (C[..., columns] * d_after).sum((-2, -1))
            d_own = (d_after * gain[..., None]).to(value.dtype)
            d_key += product_in_fp32(value[..., columns], d_own.mT)
            d_v[..., columns] = product_in_fp32(key.to(value.dtype), d_own)
        d_log_write = (key * d_key).sum(-1).double().view_as(log_write)
        d_k = d_key.mul_(_weights(log_write, dtype)).to(k.dtype).view_as(k)
        d_total = (d_keep * own_keep).double().view(log_write.shape[:2])
        return d_k, d_v.view_as(v), d_log_write, d_total, None, None


def _weights(log_write: Tensor, dtype: torch.dtype) -> Tensor:
    return log_write.exp().to(dtype).flatten(0, 1)[..., None]


def _weighted(k: Tensor, log_write: Tensor, dtype: torch.dtype) -> Tensor:
    """The weighted keys `w k`, as `[N, s, qk_dim]`."""
    return k.flatten(0, 1).to(dtype) * _weights(log_write, dtype)


def _own_state(key: Tensor, value: Tensor, columns: slice) -> Tensor:
    """Columns of what this rank's slice writes into an empty C: `[N, qk_dim, columns]`.

    The weighted keys are rounded to the type of the values, as the cell's kernels round them.
    """
    return product_in_fp32(key.to(value.dtype).mT, value[..., columns])


# ------------------------------------------------------------------ all states on every rank


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(group.size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out.unflatten(0, (group.size(), -1))


def _gather_states(
    key: Tensor, value: Tensor, total: Tensor, best: Tensor, group: dist.ProcessGroup
) -> tuple[State, Tensor, Tensor]:
    """The state before this slice; `keep` of all ranks `[cp, N]`; `gain` of this one."""
    dtype, (rows, _, qk_dim) = key.dtype, key.shape
    gates = torch.stack((total, best), -1).view(dtype)  # fp64 numbers in the bits of fp32 ones
    own = _own_state(key, value, slice(None)).flatten(1)
    states = _all_gather(torch.cat((own, key.sum(1), gates), -1), group)
    states, gates = states.split((own.shape[1] + qk_dim, gates.shape[1]), -1)
    totals, bests = gates.contiguous().view(torch.float64).unbind(-1)

    m = key.new_zeros(rows)
    state = torch.zeros_like(states[0])
    joins = []
    for rank in range(group.size()):
        if rank == group.rank():
            m_in = m
        joins.append(_join(totals[rank], bests[rank], m))
        m, keep, gain = joins[-1]
        if rank < group.rank():
            state = state.mul_(keep[:, None]).addcmul_(states[rank], gain[:, None])
    C, n = state.split((own.shape[1], qk_dim), -1)
    C = C.view(rows, qk_dim, -1).contiguous()  # as the kernels want it, apart from n
    keeps = torch.stack([join.keep for join in joins])
    return (C, n.contiguous(), m_in), keeps, joins[group.rank()].gain


def _gather_gradients(
    d_C: Tensor, d_n: Tensor, keep: Tensor, group: dist.ProcessGroup
) -> Iterator[Tensor | tuple[slice, Tensor]]:
    """Gradient of the state after this slice: of n, then of C as `(columns, gradient)`."""
    gradients = _all_gather(torch.cat((d_n, d_C.flatten(1)), -1), group)
    after = torch.zeros_like(gradients[0])
    for rank in range(group.size() - 1, group.rank(), -1):
        after = after.mul_(keep[rank][:, None]).add_(gradients[rank])
    qk_dim = d_n.shape[1]
    yield after[:, :qk_dim]
    yield slice(None), after[:, qk_dim:].reshape_as(d_C)


# ------------------------------------------------------------------ one state along the ranks


class _Line:
    """Messages that travel from rank to rank along a group.

    Each rank receives a message from the rank before it and sends one to the rank behind it. All
    receives are posted at the start, so that messages travel while this rank computes. Each has a
    tag of its own, because gloo does not promise an order among messages of one tag.

    Args:
        shapes: Shapes of the messages.
        like: A tensor with their dtype and device.
        group: The process group.
        step: 1 from the first rank to the last, -1 back.
    """

    def __init__(
        self, shapes: list[tuple[int, ...]], like: Tensor, group: dist.ProcessGroup, step: int
    ) -> None:
        self.group, self.target = group, group.rank() + step
        self.is_last = not 0 <= self.target < group.size()
        source = group.rank() - step
        self._buffers = [like.new_zeros(shape) for shape in shapes]
        self._receives: list = []
        if 0 <= source < group.size():
            self._receives = [
                dist.irecv(buffer, group=group, group_src=source, tag=tag)
                for tag, buffer in enumerate(self._buffers)
            ]
        self._sends: list = []

    def receive(self, number: int) -> Tensor:
        """Message `number` from the rank before; zeros on the first rank of the line."""
        if self._receives:
            self._receives[number].wait()
        return self._buffers[number]

    def send(self, number: int, message: Tensor) -> None:
        """Send message `number` to the rank behind (not on the line's last rank)."""
        message = message.contiguous()
        work = dist.isend(message, group=self.group, group_dst=self.target, tag=number)
        self._sends.append((work, message))

    def close(self) -> None:
        """Wait until all messages have left."""
        for work, _ in self._sends:
            work.wait()


def _pipeline_states(
    key: Tensor, value: Tensor, total: Tensor, best: Tensor, group: dist.ProcessGroup
) -> tuple[State, Tensor, Tensor]:
    """The state before this slice; `keep` and `gain` of this rank `[N]`."""
    (rows, _, qk_dim), v_dim = key.shape, value.shape[-1]
    slices = column_slices(v_dim)
    shapes = [(rows, qk_dim + 1)] + [(rows, qk_dim, c.stop - c.start) for c in slices]
    line = _Line(shapes, key, group, 1)
    n_own = key.sum(1)
    n, m = line.receive(0).split((qk_dim, 1), -1)
    join = _join(total, best, m[:, 0])
    keep, gain = join.keep[:, None], join.gain[:, None]
    if not line.is_last:
        line.send(0, torch.cat((keep * n + gain * n_own, join.m[:, None]), -1))
    C = key.new_empty(rows, qk_dim, v_dim)
    for number, columns in enumerate(slices, start=1):
        own = None if line.is_last else _own_state(key, value, columns).mul_(gain[..., None])
        C[..., columns] = line.receive(number)
        if own is not None:
            line.send(number, own.addcmul_(C[..., columns], keep[..., None]))
    line.close()
    return (C, n.contiguous(), m[:, 0].contiguous()), join.keep, join.gain


def _pipeline_gradients(
    d_C: Tensor, d_n: Tensor, keep: Tensor, group: dist.ProcessGroup
) -> Iterator[Tensor | tuple[slice, Tensor]]:
    """Gradient of the state after this slice: of n, then of C as `(columns, gradient)`.

    The caller works on one slice of columns while the next is on its way.
    """
    slices = column_slices(d_C.shape[-1])
    shapes = [tuple(d_n.shape)] + [tuple(d_C[..., columns].shape) for columns in slices]
    line = _Line(shapes, d_C, group, -1)
    keep = keep[:, None]
    after = line.receive(0)
    if not line.is_last:
        line.send(0, torch.addcmul(d_n, after, keep))
    yield after
    for number, columns in enumerate(slices, start=1):
        after = line.receive(number)
        if not line.is_last:
            line.send(number, torch.addcmul(d_C[..., columns], after, keep[..., None]))
        yield columns, after
    line.close()
