"""The sLSTM as a loop over time with torch operations, forward and backward by hand.

The recurrence through h cannot be parallelised, so what counts is the work inside the loop: one
batched product for the four gates of all heads (layout [heads, b, 4 d]), results written in place
into buffers that hold all steps, and everything that does not depend on the recurrence (local
derivatives, the gradient of the recurrent weight) done for all steps at once outside of it.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from xlstm_kernels.common.checks import compute_dtype
from xlstm_kernels.slstm.operator import Gradients, Kept, PartialState, Results, scan_operator


def _per_head(x: Tensor | None, like: Tensor) -> Tensor:
    """A state part [b, heads, d] as [heads, b, d] in the dtype of `like`; zeros for None."""
    return torch.zeros_like(like) if x is None else x.transpose(0, 1).to(like.dtype)


def _copied(x: Tensor) -> Tensor:
    """A contiguous copy of `x`."""
    return x.clone(memory_format=torch.contiguous_format)


def _columns(recurrent_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The recurrent weight as [heads, d_in, 4 d_out]: one product for all four gates."""
    _, heads, d, _ = recurrent_weight.shape
    return recurrent_weight.to(dtype).permute(1, 2, 0, 3).reshape(heads, d, 4 * d)


def _starts(boundaries: Tensor | None, steps: int) -> tuple[Tensor | None, list[bool]]:
    """Boundaries as [s, 1, b, 1], and for each step whether any row has one."""
    if boundaries is None:
        return None, [False] * steps
    return boundaries.t()[:, None, :, None], boundaries.any(0).tolist()


def allocate(gate_preacts: Tensor, cell: str) -> Results:
    """Fresh tensors for the results, of the same sizes for every cell.

    Saved are gates, factors, h, c and n of all steps, time first: [s, heads, b, ..., d], gates in
    the order i, f, z, o. h, c and n have a step more, the initial state. The LSTM has n = 1.
    """
    b, s, _, heads, d = gate_preacts.shape
    dtype = compute_dtype(gate_preacts.dtype)

    def buffer(*shape):
        return gate_preacts.new_empty(*shape, d, dtype=dtype)

    last = tuple(buffer(b, heads) for _ in range(4))
    states = [buffer(s + 1, heads, b) for _ in range(3)]
    saved = [buffer(s, heads, b, 4), buffer(s, heads, b, 2), *states]
    return Results(gate_preacts.new_empty(b, s, heads, d), last, saved)


def forward(
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    state: PartialState,
    boundaries: Tensor | None,
    sigmoid_forget: bool,
    cell: str,
) -> Results:
    """The forward pass; see `slstm_scan` and `allocate`."""
    b, s, _, heads, d = gate_preacts.shape
    dtype = compute_dtype(gate_preacts.dtype)

    def buffer(*shape):
        return gate_preacts.new_empty(*shape, d, dtype=dtype)

    # Pre-activations; the loop adds the recurrent part and turns z and o into activations.
    gates = buffer(s, heads, b, 4)
    offset = bias.to(dtype).transpose(0, 1)[:, None]  # [heads, 1, 4, d]
    torch.add(gate_preacts.permute(1, 3, 0, 2, 4), offset, out=gates)
    R = _columns(recurrent_weight, dtype)
    factors = buffer(s, heads, b, 2)  # write exp(i - m) and decay exp(log f + m_prev - m)
    hs, cs, ns = (buffer(s + 1, heads, b) for _ in range(3))
    hs[0], cs[0], ns[0] = (_per_head(x, hs[0]) for x in state[:3])
    m = _per_head(state[3], hs[0]).masked_fill(ns[0] == 0, -torch.inf)
    starts, has_start = _starts(boundaries, s)
    if cell == "lstm":
        ns[1:] = 1

    pre = gates.view(s, heads, b, 4 * d).unbind(0)
    i, f, z, o = (gate.unbind(0) for gate in gates.unbind(3))
    write, decay = (factor.unbind(0) for factor in factors.unbind(3))
    both, h, c, n = (x.unbind(0) for x in (factors, hs, cs, ns))
    for t in range(s):
        h_prev = h[t]
        if has_start[t]:
            h_prev, m = h_prev.masked_fill(starts[t], 0), m.masked_fill(starts[t], -torch.inf)
        pre[t].baddbmm_(h_prev, R)
        if cell == "lstm":
            torch.sigmoid(i[t], out=write[t])
            torch.sigmoid(f[t], out=decay[t])
            if has_start[t]:
                decay[t].masked_fill_(starts[t], 0)
            torch.mul(write[t], z[t].tanh_(), out=c[t + 1]).addcmul_(decay[t], c[t])
            torch.tanh(c[t + 1], out=h[t + 1]).mul_(o[t].sigmoid_())
            continue
        log_i = i[t] if cell == "slstm" else logsigmoid(i[t])
        carried = (logsigmoid(f[t]) if sigmoid_forget else f[t]) + m
        m = torch.maximum(carried, log_i)
        torch.sub(log_i, m, out=write[t])
        torch.sub(carried, m, out=decay[t])
        both[t].exp_()
        torch.mul(write[t], z[t].tanh_(), out=c[t + 1]).addcmul_(decay[t], c[t])
        torch.addcmul(write[t], decay[t], n[t], out=n[t + 1])
        torch.div(c[t + 1], n[t + 1], out=h[t + 1]).mul_(o[t].sigmoid_())

    out = gate_preacts.new_empty(b, s, heads, d)
    out.copy_(hs[1:].permute(2, 0, 1, 3))
    last = tuple(_copied(x.transpose(0, 1)) for x in (hs[-1], cs[-1], ns[-1], m))
    return Results(out, last, [gates, factors, hs, cs, ns])


def allocate_gradients(kept: Kept) -> Gradients:
    """Fresh tensors for the gradients."""
    gates = kept.saved[0]
    s, heads, b, _, d = gates.shape
    shapes = (b, s, 4, heads, d), (4, heads, d, d), (4, heads, d), *[(b, heads, d)] * 3
    return Gradients(*(gates.new_empty(shape) for shape in shapes))


def backward(
    kept: Kept, d_out: Tensor | None, d_last: PartialState, sigmoid_forget: bool, cell: str
) -> Gradients:
    """The backward pass."""
    gates, factors, hs, cs, ns = kept.saved
    d_h_last, d_c_last, d_n_last = d_last
    s, heads, b, _, d = gates.shape
    R = _columns(kept.recurrent_weight, gates.dtype)
    starts, has_start = _starts(kept.boundaries, s)
    z, o = gates[..., 2, :], gates[..., 3, :]
    write, decay = factors.unbind(3)

    # Local derivatives of all steps: what one step's d_h, d_c and d_n become.
    by_h = torch.empty_like(factors)  # d_h -> d_c, d_n
    if cell == "lstm":
        torch.mul(o, 1 - cs[1:].tanh().square_(), out=by_h[..., 0, :])
        by_h[..., 1, :] = 0
    else:
        torch.div(o, ns[1:], out=by_h[..., 0, :])
        torch.div(hs[1:], ns[1:], out=by_h[..., 1, :]).neg_()
    h_to_o = torch.addcmul(hs[1:], hs[1:], o, value=-1)  # d_h -> pre-activation of o
    by_c = gates.new_empty(s, heads, b, 3, d)  # d_c -> pre-activations of i, f, z
    by_n = gates.new_empty(s, heads, b, 2, d)  # d_n -> pre-activations of i, f
    torch.mul(write, z, out=by_c[..., 0, :])
    closing = decay * torch.sigmoid(-gates[..., 1, :]) if sigmoid_forget else decay
    torch.mul(closing, cs[:-1], out=by_c[..., 1, :])
    torch.addcmul(write, by_c[..., 0, :], z, value=-1, out=by_c[..., 2, :])
    by_n[..., 0, :] = write
    torch.mul(closing, ns[:-1], out=by_n[..., 1, :])
    if cell != "slstm":  # the derivative of the input gate's sigmoid
        opening = torch.sigmoid(-gates[..., 0, :])
        by_c[..., 0, :] *= opening
        by_n[..., 0, :] *= opening

    d_hs = gates.new_zeros(s + 1, heads, b, d)
    if d_out is not None:
        d_hs[1:].copy_(d_out.permute(1, 2, 0, 3))
    if d_h_last is not None:
        d_hs[-1] += d_h_last.transpose(0, 1)
    d_cn = gates.new_zeros(heads, b, 2, d)
    if d_c_last is not None:
        d_cn[:, :, 0] = d_c_last.transpose(0, 1)
    if d_n_last is not None:
        d_cn[:, :, 1] = d_n_last.transpose(0, 1)
    d_gates = torch.empty_like(gates)

    d_c, d_n, R_back = d_cn[:, :, :1], d_cn[:, :, 1:], R.mT
    d_h, flat = d_hs.unbind(0), d_gates.view(s, heads, b, 4 * d).unbind(0)
    d_h_wide = d_hs.unsqueeze(3).unbind(0)
    d_o = d_gates[..., 3, :].unbind(0)
    d_ifz, d_if = d_gates[..., :3, :].unbind(0), d_gates[..., :2, :].unbind(0)
    decay = decay.unsqueeze(3).unbind(0)
    by_h, h_to_o, by_c, by_n = (x.unbind(0) for x in (by_h, h_to_o, by_c, by_n))
    for t in reversed(range(s)):
        d_cn.addcmul_(d_h_wide[t + 1], by_h[t])
        torch.mul(d_h[t + 1], h_to_o[t], out=d_o[t])
        torch.mul(d_c, by_c[t], out=d_ifz[t])
        d_if[t].addcmul_(d_n, by_n[t])
        d_cn.mul_(decay[t])
        if has_start[t]:
            d_h[t].add_(torch.bmm(flat[t], R_back).masked_fill_(starts[t], 0))
        else:
            d_h[t].baddbmm_(flat[t], R_back)

    h_prev = hs[:-1] if starts is None else hs[:-1].masked_fill(starts, 0)
    h_prev = h_prev.transpose(0, 1).reshape(heads, s * b, d)
    d_R = torch.bmm(h_prev.mT, d_gates.transpose(0, 1).reshape(heads, s * b, 4 * d))
    grads = (
        d_gates.permute(2, 0, 3, 1, 4),
        d_R.view(heads, d, 4, d).permute(2, 0, 1, 3),
        d_gates.sum((0, 2)).transpose(0, 1),  # [4, heads, d]
        d_hs[0].transpose(0, 1),
        d_cn[:, :, 0].transpose(0, 1),
        d_cn[:, :, 1].transpose(0, 1),
    )
    return Gradients(*(_copied(x) for x in grads))


scan_forward = scan_operator(
    "slstm_scan_torch",
    forward=forward,
    allocate=allocate,
    backward=backward,
    allocate_gradients=allocate_gradients,
)
