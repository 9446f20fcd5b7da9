"""SLSTM as a loop over time with torch operations, forward and backward by hand.

The recurrence through h cannot be parallelised, so what counts is the work inside the loop: one
batched product for the four gates of all heads (layout [heads, b, 4 d]), results written in place
into buffers that hold all steps, and everything that does not depend on the recurrence (local
derivatives, the gradient of the recurrent weight) done for all steps at once outside of it.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from xlstm_kernels.checks import compute_dtype

State = tuple[Tensor, Tensor, Tensor, Tensor]


def slstm_scan_torch(
    gate_preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    initial_state: State | None,
    *,
    return_last_state: bool,
    boundaries: Tensor | None,
    forget_gate: str,
) -> Tensor | tuple[Tensor, State]:
    """Torch backend of `xlstm_kernels.slstm_scan` (checked arguments, same meaning)."""
    h, c, n, m = initial_state if initial_state is not None else (None,) * 4
    out, *state = _Scan.apply(
        gate_preacts, recurrent_weight, bias, h, c, n, m, boundaries, forget_gate == "sigmoid"
    )
    return (out, tuple(state)) if return_last_state else out


def _per_head(x: Tensor | None, like: Tensor) -> Tensor:
    """A state part [b, heads, d] as [heads, b, d] in the dtype of `like`; zeros for None."""
    return torch.zeros_like(like) if x is None else x.transpose(0, 1).to(like.dtype)


class _Scan(torch.autograd.Function):
    """Buffers hold all steps, time first: [s, heads, b, ..., d], gates in the order i, f, z, o."""

    @staticmethod
    def forward(ctx, gate_preacts, recurrent_weight, bias, h, c, n, m, boundaries, sigmoid_forget):
        b, s, _, heads, d = gate_preacts.shape
        dtype = compute_dtype(gate_preacts.dtype)

        def buffer(*shape):
            return gate_preacts.new_empty(*shape, d, dtype=dtype)

        # Pre-activations; the loop adds the recurrent part and turns z and o into activations.
        gates = buffer(s, heads, b, 4)
        offset = bias.to(dtype).transpose(0, 1)[:, None]  # [heads, 1, 4, d]
        torch.add(gate_preacts.permute(1, 3, 0, 2, 4), offset, out=gates)
        R = recurrent_weight.to(dtype).permute(1, 2, 0, 3).reshape(heads, d, 4 * d)
        factors = buffer(s, heads, b, 2)  # write exp(i - m) and decay exp(log f + m_prev - m)
        hs, cs, ns = (buffer(s + 1, heads, b) for _ in range(3))
        hs[0], cs[0], ns[0] = (_per_head(x, hs[0]) for x in (h, c, n))
        m = _per_head(m, hs[0]).masked_fill(ns[0] == 0, -torch.inf)
        starts = None if boundaries is None else boundaries.t()[:, None, :, None]  # [s, 1, b, 1]
        has_start = [False] * s if starts is None else boundaries.any(0).tolist()

        pre = gates.view(s, heads, b, 4 * d).unbind(0)
        i, f, z, o = (gate.unbind(0) for gate in gates.unbind(3))
        write, decay = (factor.unbind(0) for factor in factors.unbind(3))
        both, h, c, n = (x.unbind(0) for x in (factors, hs, cs, ns))
        for t in range(s):
            h_prev = h[t]
            if has_start[t]:
                h_prev, m = h_prev.masked_fill(starts[t], 0), m.masked_fill(starts[t], -torch.inf)
            pre[t].baddbmm_(h_prev, R)
            carried = (logsigmoid(f[t]) if sigmoid_forget else f[t]) + m
            m = torch.maximum(carried, i[t])
            torch.sub(i[t], m, out=write[t])
            torch.sub(carried, m, out=decay[t])
            both[t].exp_()
            torch.mul(write[t], z[t].tanh_(), out=c[t + 1]).addcmul_(decay[t], c[t])
            torch.addcmul(write[t], decay[t], n[t], out=n[t + 1])
            torch.div(c[t + 1], n[t + 1], out=h[t + 1]).mul_(o[t].sigmoid_())

        ctx.save_for_backward(gates, factors, hs, cs, ns, R, starts)
        ctx.has_start, ctx.sigmoid_forget = has_start, sigmoid_forget
        ctx.dtypes = gate_preacts.dtype, recurrent_weight.dtype, bias.dtype
        ctx.set_materialize_grads(False)
        m = m.transpose(0, 1).contiguous()
        ctx.mark_non_differentiable(m)
        last = (x[-1].transpose(0, 1).contiguous() for x in (hs, cs, ns))
        return hs[1:].permute(2, 0, 1, 3).to(gate_preacts.dtype), *last, m

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_h_last, d_c_last, d_n_last, _):
        gates, factors, hs, cs, ns, R, starts = ctx.saved_tensors
        s, heads, b, _, d = gates.shape
        z, o = gates[..., 2, :], gates[..., 3, :]
        write, decay = factors.unbind(3)

        # Local derivatives of all steps: what one step's d_h, d_c and d_n become.
        by_h = torch.empty_like(factors)  # d_h -> d_c, d_n
        torch.div(o, ns[1:], out=by_h[..., 0, :])
        torch.div(hs[1:], ns[1:], out=by_h[..., 1, :]).neg_()
        h_to_o = torch.addcmul(hs[1:], hs[1:], o, value=-1)  # d_h -> pre-activation of o
        by_c = gates.new_empty(s, heads, b, 3, d)  # d_c -> pre-activations of i, f, z
        by_n = gates.new_empty(s, heads, b, 2, d)  # d_n -> pre-activations of i, f
        torch.mul(write, z, out=by_c[..., 0, :])
        closing = decay * torch.sigmoid(-gates[..., 1, :]) if ctx.sigmoid_forget else decay
        torch.mul(closing, cs[:-1], out=by_c[..., 1, :])
        torch.addcmul(write, by_c[..., 0, :], z, value=-1, out=by_c[..., 2, :])
        by_n[..., 0, :] = write
        torch.mul(closing, ns[:-1], out=by_n[..., 1, :])

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
            if ctx.has_start[t]:
                d_h[t].add_(torch.bmm(flat[t], R_back).masked_fill_(starts[t], 0))
            else:
                d_h[t].baddbmm_(flat[t], R_back)

        h_prev = hs[:-1] if starts is None else hs[:-1].masked_fill(starts, 0)
        h_prev = h_prev.transpose(0, 1).reshape(heads, s * b, d)
        d_R = torch.bmm(h_prev.mT, d_gates.transpose(0, 1).reshape(heads, s * b, 4 * d))
        d_bias = d_gates.sum((0, 2)).transpose(0, 1)  # [4, heads, d]
        gates_dtype, weight_dtype, bias_dtype = ctx.dtypes
        need = ctx.needs_input_grad
        return (
            d_gates.permute(2, 0, 3, 1, 4).to(gates_dtype),
            d_R.view(heads, d, 4, d).permute(2, 0, 1, 3).to(weight_dtype),
            d_bias.to(bias_dtype),
            d_hs[0].transpose(0, 1) if need[3] else None,
            d_cn[:, :, 0].transpose(0, 1) if need[4] else None,
            d_cn[:, :, 1].transpose(0, 1) if need[5] else None,
            None,
            None,
            None,
        )  # fmt: skip
