"""xLSTM language models whose blocks are spelled by a pattern: the papers' model in one file.

One letter of `config.pattern` is one residual layer, `x + mixer(norm(x))` and, except for `m`,
`x + feed_forward(norm(x))`:

- `M`: the mLSTM block of xLSTM 7B (arXiv 2503.13427, figure 8).
- `m`: the mLSTM block of the xLSTM paper (arXiv 2405.04517, figure 11).
- `s`: its sLSTM block (same paper, figure 10).
- `l`: the sLSTM block around the cell of the LSTM (same paper, "LSTM (Block)"), a baseline.
- `*`: causal attention with rotary positions, for hybrids and baselines.

The file goes from the inside out: cells, their norms and projections, mixers, layers, the model.

The cells are written in plain PyTorch. Where the package `xlstm_kernels` is installed, its faster
implementations of the same equations are used. The state between calls has a constant size, except
for the past of attention layers without a window.

Padding may lie anywhere in a row. The model moves it to the front, where every cell's state is
still empty, and moves the results back. So a padded batch gives what its rows give alone.

Shapes in comments: `b` rows of a batch, `s` tokens of a row, `d` channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_xlstm_blocks import XLSTMBlocksConfig

try:
    import xlstm_kernels as kernels
except ImportError:
    kernels = None

#: Tokens of the mLSTM that are computed as one block of a matrix product.
CHUNK = 64


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(x / cap)`; None leaves `x` as it is."""
    return x if cap is None else cap * torch.tanh(x / cap)


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 if that is what it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Cells ----------------------------------------------------------------------------------------


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    state: tuple[Tensor, Tensor, Tensor] | None,
    config: XLSTMBlocksConfig,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The mLSTM (arXiv 2405.04517, eq. 19 to 27), a chunk of tokens at a time.

    Its recurrence, with q divided by the square root of its channels:

        C_t = f_t C_(t-1) + i_t k_t v_t^T
        n_t = f_t n_(t-1) + i_t k_t
        h_t = C_t^T q_t / max(|n_t^T q_t|, 1)

    Args:
        q: `[b, heads, s, qk]`.
        k: `[b, heads, s, qk]`.
        v: `[b, heads, s, v]`.
        log_i: Logarithm of the input gate, `[b, heads, s]`.
        log_f: Logarithm of the forget gate, `[b, heads, s]`.
        state: `C [b, heads, qk, v]`, `n [b, heads, qk]` and `m [b, heads]`, or None. `C` and `n`
            are stored times `exp(-m)`, so that they stay in the range of fp32.
        config: The input gate's activation, `cell_eps` and `mlstm_normalize` are read.

    Returns:
        Hidden states `[b, heads, s, v]` and the last state.
    """
    q = q * q.shape[-1] ** -0.5
    if state is None:
        b, heads, _, qk = q.shape
        shapes = (b, heads, qk, v.shape[-1]), (b, heads, qk), (b, heads)
        state = tuple(map(q.new_zeros, shapes))
    hidden = []
    chunks = [t.split(CHUNK, dim=2) for t in (q, k, v, log_i, log_f)]
    for chunk in zip(*chunks, strict=True):
        h, state = mlstm_chunk(*chunk, state, config)
        hidden.append(h)
    return torch.cat(hidden, dim=2), state


def mlstm_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    config: XLSTMBlocksConfig,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """One chunk of `mlstm`, in parallel over its tokens.

    Unrolled, token t sees token j <= t with the weight `exp(F_t - F_j + log_i_j)`, and the state
    before the chunk with the weight `exp(F_t)`, where `F_t` sums up `log_f`. Every exponent is
    taken relative to a stabiliser `m_t`, which carries no gradient: the result does not depend on
    it.
    """
    C, n, m = state
    F_t = log_f.cumsum(-1)
    log_old = F_t + m[..., None]  # weight of the state before the chunk, [..., t]
    log_new = F_t[..., :, None] - F_t[..., None, :] + log_i[..., None, :]  # [..., t, j]
    causal = torch.ones(log_new.shape[-2:], dtype=torch.bool, device=q.device).tril()
    log_new = log_new.masked_fill(~causal, -torch.inf)
    if config.mlstm_gate == "exp":
        m_t = torch.maximum(log_old, log_new.amax(-1)).detach()
    else:
        m_t = torch.zeros_like(F_t)  # a sigmoid gate cannot overflow
    old, new = (log_old - m_t).exp()[..., None], (log_new - m_t[..., None]).exp()

    scores = (q @ k.mT) * new
    h = scores @ v + old * (q @ C)
    if config.mlstm_normalize:
        nq = scores.sum(-1, keepdim=True) + old * (q * n[..., None, :]).sum(-1, keepdim=True)
        # The equation's 1 is exp(-m) here. It stays above e^-80: no 0 / 0 where cell_eps is 0 and
        # q is orthogonal to n.
        one = (-m_t).clamp(min=-80).exp()[..., None]
        h = h / (torch.maximum(nq.abs(), one) + config.cell_eps)

    # The state after the chunk's last token.
    m = m_t[..., -1]
    keep = (log_old[..., -1] - m).exp()
    write = (F_t[..., -1:] - F_t + log_i - m[..., None]).exp()[..., None]
    C = keep[..., None, None] * C + (write * k).mT @ v
    n = keep[..., None] * n + (write * k).sum(-2)
    return h, (C, n, m)


def slstm(
    preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    state: tuple[Tensor, ...] | None,
    padding: Tensor | None,
    forget_gate: str,
    input_gate: str,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sLSTM (arXiv 2405.04517, eq. 8 to 17), token by token: the gates see the last output.

    Its recurrence, with the gates i, f, z and o of `preacts_t + R h_(t-1) + bias`:

        c_t = f_t c_(t-1) + i_t tanh(z_t)
        n_t = f_t n_(t-1) + i_t
        h_t = sigmoid(o_t) c_t / n_t

    Args:
        preacts: The input's part of the gates i, f, z, o, `[b, s, 4, heads, d]`.
        recurrent_weight: `[4, heads, d_in, d_out]`.
        bias: `[4, heads, d]`.
        state: `h`, `c`, `n` and `m`, each `[b, heads, d]`, or None. `c` and `n` are stored times
            `exp(-m)`, which no output depends on.
        padding: Bool `[b, s]`, True where the state stays empty, or None.
        forget_gate: Its activation, "sigmoid" or "exp".
        input_gate: Its activation, "exp" or "sigmoid".

    Returns:
        Hidden states `[b, s, heads, d]` and the last state.
    """
    if state is None:
        state = (preacts.new_zeros(preacts[:, 0, 0].shape),) * 4
    h, c, n, m = state
    hidden = []
    for t in range(preacts.shape[1]):
        recurrent = torch.einsum("bhd,ghde->bghe", h, recurrent_weight)
        i, f, z, o = (preacts[:, t] + recurrent + bias).unbind(1)
        log_f = logsigmoid(f) if forget_gate == "sigmoid" else f
        log_i = logsigmoid(i) if input_gate == "sigmoid" else i
        kept = log_f + m.masked_fill(n == 0, -torch.inf)  # an empty memory has no scale
        m = torch.maximum(kept, log_i).detach()
        decay, write = (kept - m).exp(), (log_i - m).exp()
        c = decay * c + write * z.tanh()
        n = decay * n + write
        h = o.sigmoid() * c / n
        if padding is not None:
            empty = padding[:, t, None, None]
            h, c, n, m = (x.masked_fill(empty, 0.0) for x in (h, c, n, m))
        hidden.append(h)
    return torch.stack(hidden, dim=1), (h, c, n, m)


def lstm(
    preacts: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor,
    state: tuple[Tensor, Tensor] | None,
    padding: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The LSTM (arXiv 2405.04517, eq. 2 to 7) with the sLSTM's recurrence by heads.

    Arguments and results are those of `slstm`; the state is `h` and `c`.
    """
    if state is None:
        state = (preacts.new_zeros(preacts[:, 0, 0].shape),) * 2
    h, c = state
    hidden = []
    for t in range(preacts.shape[1]):
        recurrent = torch.einsum("bhd,ghde->bghe", h, recurrent_weight)
        i, f, z, o = (preacts[:, t] + recurrent + bias).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * c.tanh()
        if padding is not None:
            empty = padding[:, t, None, None]
            h, c = h.masked_fill(empty, 0.0), c.masked_fill(empty, 0.0)
        hidden.append(h)
    return torch.stack(hidden, dim=1), (h, c)


def starts(padding: Tensor | None) -> Tensor | None:
    """Bool `[b, s]`, True at the first token after the padding in front of a row, or None."""
    if padding is None:
        return None
    # What the roll brings from the end to the front counts nowhere: a row that ends in padding
    # holds nothing else.
    return padding.roll(1, dims=1) & ~padding


# Modules --------------------------------------------------------------------------------------


class XLSTMBlocksNorm(nn.Module):
    """RMSNorm or LayerNorm without bias, computed in fp32."""

    def __init__(self, config: XLSTMBlocksConfig) -> None:
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden]`, same shape."""
        wide, weight = at_least_fp32(x), at_least_fp32(self.weight)
        if self.kind == "layernorm":
            return F.layer_norm(wide, weight.shape, weight, None, self.eps).to(x.dtype)
        return F.rms_norm(wide, weight.shape, weight, self.eps).to(x.dtype)


class XLSTMBlocksHeadNorm(nn.Module):
    """Norm of each head's output, with a weight for every channel, computed in fp32."""

    def __init__(self, config: XLSTMBlocksConfig, width: int) -> None:
        super().__init__()
        self.kind, self.eps = config.head_norm, config.norm_eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, h: Tensor) -> Tensor:
        """`[b, s, heads, d]` to `[b, s, heads * d]`, in fp32 (fp64 for fp64)."""
        wide = at_least_fp32(h)
        if self.kind == "layernorm":
            wide = F.layer_norm(wide, wide.shape[-1:], eps=self.eps)
        elif self.kind == "rmsnorm":
            wide = F.rms_norm(wide, wide.shape[-1:], eps=self.eps)
        return wide.flatten(2) * at_least_fp32(self.weight)


class XLSTMBlocksConv(nn.Module):
    """Causal depthwise convolution and SiLU, oldest tap first."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, padding: Tensor | None, state: dict | None) -> Tensor:
        """`[b, s, channels]`, same shape; `state["conv"]` holds the inputs before these."""
        past = self.weight.shape[1] - 1
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0.0)
        before = None if state is None else state.get("conv")
        if before is None:
            before = x.new_zeros(x.shape[0], past, x.shape[2])
        seen = torch.cat((before, x), dim=1)
        if state is not None:
            state["conv"] = seen[:, seen.shape[1] - past :]
        y = F.conv1d(seen.mT, self.weight[:, None], self.bias, groups=x.shape[2])
        return F.silu(y.mT)


class XLSTMBlocksBlockDiagonal(nn.Module):
    """A bias-free linear map of blocks of channels."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, width, width))  # block, out, in

    def forward(self, x: Tensor) -> Tensor:
        """`[b, s, blocks * width]`, same shape."""
        x = x.unflatten(-1, self.weight.shape[:2])
        return torch.einsum("bsni,noi->bsno", x, self.weight).flatten(2)


class XLSTMBlocksGate(nn.Linear):
    """Pre-activations of a gate for every head, in fp32, because exponents need the digits.

    Args:
        width: Width of the input.
        heads: Number of heads.
        first: Initial bias of the first head.
        last: Initial bias of the last head; those between lie between. The weight starts at 0.
        noise: Standard deviation of what is added to the initial biases.
    """

    def __init__(
        self, width: int, heads: int, first: float, last: float, noise: float = 0.0
    ) -> None:
        super().__init__(width, heads)
        self.initial = first, last, noise

    def forward(self, x: Tensor) -> Tensor:
        """`[b, s, width]` to `[b, heads, s]`."""
        x = at_least_fp32(x)
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).mT


def output_projection(width: int, config: XLSTMBlocksConfig) -> nn.Linear:
    """A projection back to the residual stream; the deeper the model, the smaller it starts."""
    linear = nn.Linear(width, config.hidden_size, bias=False)
    linear.initial_std = 2 / (config.num_hidden_layers * config.hidden_size**0.5)
    return linear


class XLSTMBlocksFeedForward(nn.Module):
    """`W_down (activation(W_gate x) * W_up x)`."""

    def __init__(self, config: XLSTMBlocksConfig, width: int, activation) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = output_projection(width, config)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, s, hidden]`, same shape."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


# Mixers ---------------------------------------------------------------------------------------
#
# Each has `forward(x, padding, state)`, which mixes `x [b, s, hidden]` along the sequence and keeps
# its shape. `padding` is bool `[b, s]`, True in front of a row's tokens, or None. `state` is this
# layer's dictionary in the cache, which the mixer reads and updates, or None.


class XLSTMBlocksMLSTMBase(nn.Module):
    """What both mLSTM blocks share: the cell with its options, and its gates."""

    def __init__(self, config: XLSTMBlocksConfig) -> None:
        super().__init__()
        self.config, self.num_heads = config, config.num_heads

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations `[b, heads, s]` of the input gate and of the forget gate."""
        # A forget gate of its bias alone keeps its weight, with a gradient of zero.
        seen = 0.0 * x if self.config.mlstm_forget_gate == "bias" else x
        return self.igate(x), self.fgate(seen)

    def cell(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        padding: Tensor | None,
        state: dict | None,
    ) -> Tensor:
        """Hidden states `[b, s, heads, v]` of `q`, `k`, `v` `[b, s, heads * d]` and the gates."""
        config = self.config
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        # A gate that is held open keeps its parameters, with a gradient of zero. The sigmoid of 60
        # is 1 to the last bit.
        if not config.mlstm_input_gate:
            i = 0.0 * i + (0.0 if config.mlstm_gate == "exp" else 60.0)
        if not config.mlstm_forget_gate:
            f = 0.0 * f + 60.0
        before = None if state is None else state.get("mlstm")
        if kernels is not None:
            options = {
                "gate": config.mlstm_gate,
                "normalize": config.mlstm_normalize,
                "eps": config.cell_eps,
            }
            if before is not None and q.shape[2] == 1 and not torch.is_grad_enabled():
                token = (t.squeeze(2) for t in (q, k, v, i, f))
                h = kernels.mlstm_step(*token, before, **options)  # updates the state in place
                return h[:, None]
            options |= {"boundaries": starts(padding), "return_last_state": True}
            h, last = kernels.mlstm_chunkwise(q, k, v, i, f, before, **options)
        else:
            log_i = i if config.mlstm_gate == "exp" else logsigmoid(i)
            log_f = logsigmoid(f)
            if padding is not None:  # nothing is written, nothing is forgotten
                log_i = log_i.masked_fill(padding[:, None], -torch.inf)
                log_f = log_f.masked_fill(padding[:, None], 0.0)
            h, last = mlstm(*map(at_least_fp32, (q, k, v)), log_i, log_f, before, config)
            h = h.to(q.dtype)
        if state is not None:
            state["mlstm"] = last
        return h.transpose(1, 2)


class XLSTMBlocksMLSTM(XLSTMBlocksMLSTMBase):
    """`M`: `W_out (sigmoid(o) * norm(mLSTM(q, k, v)))` with `q, k, v, o = W x` and capped gates."""

    def __init__(self, config: XLSTMBlocksConfig, number: int) -> None:
        super().__init__(config)
        hidden, qk, v = config.hidden_size, config.qk_dim, config.v_dim
        self.q_proj = nn.Linear(hidden, qk, bias=False)
        self.k_proj = nn.Linear(hidden, qk, bias=False)
        self.v_proj = nn.Linear(hidden, v, bias=False)
        self.ogate = nn.Linear(hidden, v, bias=False)
        self.ogate.initial_std = 0.0
        self.igate = XLSTMBlocksGate(hidden, self.num_heads, -10.0, -10.0)
        self.fgate = XLSTMBlocksGate(hidden, self.num_heads, 3.0, 6.0)
        self.head_norm = XLSTMBlocksHeadNorm(config, v)
        self.out_proj = output_projection(v, config)

    def forward(self, x: Tensor, padding: Tensor | None, state: dict | None) -> Tensor:
        """See "Mixers" above."""
        i, f = (soft_cap(gate, self.config.gate_soft_cap) for gate in self.gates(x))
        h = self.cell(self.q_proj(x), self.k_proj(x), self.v_proj(x), i, f, padding, state)
        gated = self.head_norm(h) * at_least_fp32(self.ogate(x)).sigmoid()
        return self.out_proj(gated.to(x.dtype))


class XLSTMBlocksClassicMLSTM(XLSTMBlocksMLSTMBase):
    """`m`: `W_out ((norm(mLSTM(q, k, v)) + skip * c) * SiLU(z))` with `u, z = W x`.

    Here `c = SiLU(conv(u))`, and q, k and v are block-diagonal maps of c, c and u.
    """

    def __init__(self, config: XLSTMBlocksConfig, number: int) -> None:
        super().__init__(config)
        inner, block = config.up_dim, config.qkv_block_size
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.z_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.conv = XLSTMBlocksConv(inner, config.conv_width) if config.conv_width else None
        self.q_proj = XLSTMBlocksBlockDiagonal(inner // block, block)
        self.k_proj = XLSTMBlocksBlockDiagonal(inner // block, block)
        self.v_proj = XLSTMBlocksBlockDiagonal(inner // block, block)
        self.igate = XLSTMBlocksGate(3 * inner, self.num_heads, 0.0, 0.0, noise=0.1)
        self.fgate = XLSTMBlocksGate(3 * inner, self.num_heads, 3.0, 6.0)
        self.head_norm = XLSTMBlocksHeadNorm(config, inner)
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.out_proj = output_projection(inner, config)

    def forward(self, x: Tensor, padding: Tensor | None, state: dict | None) -> Tensor:
        """See "Mixers" above."""
        x_m, z = self.up_proj(x), self.z_proj(x)
        x_c = x_m if self.conv is None else self.conv(x_m, padding, state)
        q, k, v = self.q_proj(x_c), self.k_proj(x_c), self.v_proj(x_m)
        i, f = self.gates(torch.cat((q, k, v), dim=-1))  # the gates see all heads
        h = self.cell(q, k, v, i, f, padding, state)
        h = self.head_norm(h).to(x.dtype)
        return self.out_proj((h + self.learnable_skip * x_c) * F.silu(z))


class XLSTMBlocksSLSTM(nn.Module):
    """`s`: `norm(sLSTM(W_i c, W_f c, W_z x, W_o x))` with `c = SiLU(conv(x))`, head by head.

    There is no projection out: the feed-forward part that follows mixes the heads.
    """

    cell_name = "slstm"  # with `_scan` and `_step`, what `xlstm_kernels` calls it
    plain_cell = staticmethod(slstm)

    def __init__(self, config: XLSTMBlocksConfig, number: int) -> None:
        super().__init__()
        self.config, heads, width = config, config.num_heads, config.hidden_size
        self.depth = number / max(1, config.num_hidden_layers - 1)
        d = width // heads
        taps = config.conv_width if config.slstm_conv_width is None else config.slstm_conv_width
        self.conv = XLSTMBlocksConv(width, taps) if taps else None
        self.igate = XLSTMBlocksBlockDiagonal(heads, d)
        self.fgate = XLSTMBlocksBlockDiagonal(heads, d)
        self.zgate = XLSTMBlocksBlockDiagonal(heads, d)
        self.ogate = XLSTMBlocksBlockDiagonal(heads, d)
        self.recurrent_weight = nn.Parameter(torch.empty(4, heads, d, d))  # gate, head, in, out
        self.bias = nn.Parameter(torch.empty(4, heads, d))
        self.head_norm = XLSTMBlocksHeadNorm(config, width)

    def forward(self, x: Tensor, padding: Tensor | None, state: dict | None) -> Tensor:
        """See "Mixers" above."""
        x_c = x if self.conv is None else self.conv(x, padding, state)
        gates = (self.igate(x_c), self.fgate(x_c), self.zgate(x), self.ogate(x))
        preacts = torch.stack(gates, dim=2).unflatten(-1, (self.config.num_heads, -1))
        return self.head_norm(self.cell(preacts, padding, state)).to(x.dtype)

    def cell(self, preacts: Tensor, padding: Tensor | None, state: dict | None) -> Tensor:
        """Hidden states `[b, s, heads, d]` of the gates' pre-activations `[b, s, 4, heads, d]`."""
        weights = self.recurrent_weight, self.bias
        options = self.options()
        before = None if state is None else state.get(self.cell_name)
        if kernels is not None:
            if before is not None and preacts.shape[1] == 1 and not torch.is_grad_enabled():
                step = getattr(kernels, f"{self.cell_name}_step")
                h = step(preacts[:, 0], *weights, before, **options)  # updates the state in place
                return h[:, None]
            scan = getattr(kernels, f"{self.cell_name}_scan")
            options |= {"boundaries": starts(padding), "return_last_state": True}
            h, last = scan(preacts, *weights, before, **options)
        else:
            wide = map(at_least_fp32, (preacts, *weights))
            h, last = self.plain_cell(*wide, before, padding, **options)
            h = h.to(preacts.dtype)
        if state is not None:
            state[self.cell_name] = last
        return h

    def options(self) -> dict:
        """What the cell is told beside its tensors."""
        config = self.config
        return {"forget_gate": config.slstm_forget_gate, "input_gate": config.slstm_input_gate}


class XLSTMBlocksLSTM(XLSTMBlocksSLSTM):
    """`l`: the same block around the LSTM."""

    cell_name = "lstm"
    plain_cell = staticmethod(lstm)

    def options(self) -> dict:
        """The LSTM has none."""
        return {}


class XLSTMBlocksAttention(nn.Module):
    """`*`: causal attention with rotary positions; several heads of q may share one of k and v."""

    def __init__(self, config: XLSTMBlocksConfig, number: int) -> None:
        super().__init__()
        self.config, hidden = config, config.hidden_size
        self.head_dim = hidden // config.attention_heads
        q, kv = config.attention_heads * self.head_dim, config.attention_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, q, bias=False)
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.out_proj = output_projection(q, config)

    def forward(self, x: Tensor, padding: Tensor | None, state: dict | None) -> Tensor:
        """See "Mixers" above; the state is that of `seen_later`."""
        b, s, _ = x.shape
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # [b, heads, s, d]
        real = x.new_ones(b, s, dtype=torch.bool) if padding is None else ~padding
        positions = (state["tokens"] if state else 0) + real.cumsum(1) - 1
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        known = {"k": k, "v": v, "real": real, "positions": positions}
        if state:  # it is an empty dictionary before the first call
            known = {n: torch.cat((state[n], t), 2 if n in "kv" else 1) for n, t in known.items()}
        k, v = known["k"], known["v"]
        window, sinks = self.config.attention_window, self.config.attention_sinks
        mask = None
        if padding is not None or state or (window is not None and s > window + sinks):
            key = torch.arange(k.shape[2], device=x.device)
            query = key[-s:, None]
            seen = known["real"][:, None] & (key <= query)
            if window is not None:
                place = known["positions"][:, None]
                seen = seen & ((positions[..., None] - place < window) | (place < sinks))
            mask = (seen | (key == query))[:, None]  # padding sees itself, so that no row is empty
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
        if state is not None:
            state |= self.seen_later(known, positions[:, -1:] + 1)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def seen_later(self, known: dict, tokens: Tensor) -> dict:
        """`k`, `v`, `real` (False at padding) and `positions` of what the next token may see.

        `tokens [b, 1]` is the number of tokens of each row so far, padding left out.
        """
        window, sinks = self.config.attention_window, self.config.attention_sinks
        known["tokens"] = tokens
        if window is None or known["k"].shape[2] <= window - 1 + sinks:
            return known
        place = known["positions"]
        needed = known["real"] & ((tokens - place < window) | (place < sinks))
        chosen = needed.long().argsort(dim=1, descending=True, stable=True)[:, : window - 1 + sinks]
        wide = chosen[:, None, :, None].expand(-1, known["k"].shape[1], -1, self.head_dim)
        known |= {name: known[name].gather(2, wide) for name in "kv"}
        return known | {"real": needed.gather(1, chosen), "positions": place.gather(1, chosen)}

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn channel pairs `(i, i + d/2)` of `x [b, heads, s, d]` by their positions' angles.

        Angles are fp64, because at position 10^6 one in fp32 is off by 0.06.
        """
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=x.device)
        angles = positions[:, None, :, None] * self.config.rotary_base ** (-pairs / self.head_dim)
        a, c = at_least_fp32(x).chunk(2, dim=-1)
        cos, sin = angles.cos().to(a.dtype), angles.sin().to(a.dtype)
        return torch.cat((a * cos - c * sin, c * cos + a * sin), dim=-1).to(x.dtype)


# Layers and the model -------------------------------------------------------------------------

MIXERS = {
    "M": XLSTMBlocksMLSTM,
    "m": XLSTMBlocksClassicMLSTM,
    "s": XLSTMBlocksSLSTM,
    "l": XLSTMBlocksLSTM,
    "*": XLSTMBlocksAttention,
}


class XLSTMBlocksLayer(GradientCheckpointingLayer):
    """`x + mixer(norm(x))` and then, where the block has one, `x + feed_forward(norm(x))`."""

    def __init__(self, config: XLSTMBlocksConfig, number: int) -> None:
        super().__init__()
        self.letter, self.number = config.pattern[number], number
        self.dropout, self.residual = config.dropout, config.residual
        if self.letter not in MIXERS:
            raise ValueError(
                f"pattern={config.pattern!r}: {self.letter!r} is not a block, use {list(MIXERS)}"
            )
        self.mixer_norm = XLSTMBlocksNorm(config)
        self.mixer = MIXERS[self.letter](config, number)
        self.ffn = None
        width, activation = config.ffn_dim, F.silu
        if self.letter in "sl":
            width, activation = config.slstm_ffn_dim, F.gelu
        if self.letter != "m" and width:
            self.ffn_norm = XLSTMBlocksNorm(config)
            self.ffn = XLSTMBlocksFeedForward(config, width, activation)

    def forward(self, x: Tensor, padding: Tensor | None, state: dict | None) -> Tensor:
        """`[b, s, hidden]`, same shape."""
        x = self.add(x, self.mixer(self.mixer_norm(x), padding, state))
        if self.ffn is not None:
            x = self.add(x, self.ffn(self.ffn_norm(x)))
        return x

    def add(self, x: Tensor, change: Tensor) -> Tensor:
        """`x + change`, with dropout of the change."""
        change = F.dropout(change, self.dropout, self.training)
        return x + change if self.residual else change


class XLSTMBlocksCache:
    """What the layers carry from call to call.

    Attributes:
        layers: The state of each layer: tensors by name, or tuples of tensors, batch first.
        tokens: Tokens seen so far, padding included.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers: list[dict] = [{} for _ in range(num_layers)]
        self.tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, as beam search asks."""
        for layer in self.layers:
            for key, value in layer.items():
                layer[key] = _each(lambda t: t.index_select(0, beam_idx.to(t.device)), value)

    def recurrent(self) -> list[dict]:
        """A copy of the states that do not grow, layer by layer."""
        return [
            {
                key: _each(torch.clone, layer[key])
                for key in ("conv", "mlstm", "slstm", "lstm")
                if key in layer
            }
            for layer in self.layers
        ]

    def put_back(self, rows: Tensor, before: list[dict]) -> None:
        """Give some rows (bool `[b]`) the states of `recurrent` back."""

        def chosen(now: Tensor, then: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (now.ndim - 1)), then, now)

        for layer, old in zip(self.layers, before, strict=True):
            layer |= {key: _each(chosen, layer[key], value) for key, value in old.items()}


def _each(function, *values):
    """`function` of tensors, or of each tensor of tuples."""
    if isinstance(values[0], tuple):
        return tuple(map(function, *values))
    return function(*values)


class XLSTMBlocksPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial values."""

    config_class = XLSTMBlocksConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["XLSTMBlocksLayer"]
    _is_stateful = True  # a state cannot be rolled back
    _supports_sdpa = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own, of constant size

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of both papers."""
        small = (2 / (5 * self.config.hidden_size)) ** 0.5
        if isinstance(module, XLSTMBlocksGate):
            first, last, noise = module.initial
            bias = torch.linspace(first, last, module.out_features)
            init.zeros_(module.weight)
            init.copy_(module.bias, (bias + noise * torch.randn(bias.shape)).to(module.bias))
        elif isinstance(module, nn.Linear | nn.Embedding | XLSTMBlocksBlockDiagonal):
            init.normal_(module.weight, std=getattr(module, "initial_std", small))
        elif isinstance(module, XLSTMBlocksNorm | XLSTMBlocksHeadNorm):
            init.ones_(module.weight)
        elif isinstance(module, XLSTMBlocksConv):
            bound = module.weight.shape[1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, XLSTMBlocksClassicMLSTM):
            init.ones_(module.learnable_skip)
        elif isinstance(module, XLSTMBlocksLSTM):
            init.zeros_(module.recurrent_weight)
            init.zeros_(module.bias)
            init.ones_(module.bias[1])  # the forget gate's
        elif isinstance(module, XLSTMBlocksSLSTM):
            # Forget gates fall from 5 to -7 over a head's channels, in a curve set by the depth.
            bias = torch.zeros(module.bias.shape)
            place = torch.arange(bias.shape[-1]) / max(1, bias.shape[-1] - 1)
            bias[1] = 5.0 - 12.0 * place ** (0.3 + 1.3 * module.depth)
            init.zeros_(module.recurrent_weight)
            init.copy_(module.bias, bias.to(module.bias))


class XLSTMBlocksModel(XLSTMBlocksPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: XLSTMBlocksConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            XLSTMBlocksLayer(config, number) for number in range(config.num_hidden_layers)
        )
        self.norm = XLSTMBlocksNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: XLSTMBlocksCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states after the final norm.

        Args:
            input_ids: Tokens `[b, s]`.
            attention_mask: `[b, s]`, or `[b, past + s]` with a cache; 0 at padding, which may be
                anywhere. What is returned at padding means nothing.
            past_key_values: The state to go on from; it is updated.
            inputs_embeds: `[b, s, hidden]` in place of `input_ids`.
            use_cache: Whether to return the state; by default as configured, and not in training.
            output_hidden_states: Whether to return what enters every layer, and the last output.
            return_dict: False for a tuple.
            **kwargs: Ignored.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = past_key_values
        if cache is None and use_cache:
            cache = XLSTMBlocksCache(len(self.layers))
        padding = None
        if attention_mask is not None:
            padding = attention_mask[:, -x.shape[1] :] == 0
            padding = padding if padding.any() else None

        if padding is not None and cache is not None and cache.tokens:
            hidden = self._token_by_token(x, padding, cache)
        elif padding is not None:
            order = padding.logical_not().long().argsort(dim=1, stable=True)[..., None]
            front = padding.sort(dim=1, descending=True).values
            moved = self._layers(torch.take_along_dim(x, order, 1), front, cache)
            back = order.argsort(dim=1)
            hidden = [torch.take_along_dim(h, back, 1) for h in moved]
        else:
            hidden = self._layers(x, None, cache)
        if cache is not None:
            cache.tokens += x.shape[1]
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden[-1],
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()

    def _layers(
        self, x: Tensor, padding: Tensor | None, cache: XLSTMBlocksCache | None
    ) -> list[Tensor]:
        """What enters each layer, and the normalised output of the last one."""
        hidden = []
        for layer in self.layers:
            hidden.append(x)
            x = layer(x, padding, None if cache is None else cache.layers[layer.number])
        return [*hidden, self.norm(x)]

    def _token_by_token(self, x: Tensor, padding: Tensor, cache: XLSTMBlocksCache) -> list[Tensor]:
        """Padding after a past: rows that are not at a token keep their state meanwhile."""
        steps = []
        for t in range(x.shape[1]):
            before = cache.recurrent()
            steps.append(self._layers(x[:, t : t + 1], padding[:, t : t + 1], cache))
            cache.put_back(padding[:, t], before)
        return [torch.cat(parts, dim=1) for parts in zip(*steps, strict=True)]


class XLSTMBlocksForCausalLM(XLSTMBlocksPreTrainedModel, GenerationMixin):
    """The model with its output layer: logits, the loss of labels, and `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: XLSTMBlocksConfig) -> None:
        super().__init__(config)
        self.model = XLSTMBlocksModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the output layer."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: XLSTMBlocksCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits in fp32 and, with labels, the mean loss of the next tokens.

        Rows of the vocabulary without a token have the logit minus infinity.

        Args:
            input_ids: See `XLSTMBlocksModel.forward`.
            attention_mask: See there.
            past_key_values: See there.
            inputs_embeds: See there.
            labels: Tokens `[b, s]`; logits at t are compared with the label at t + 1, and labels
                of -100 do not count.
            use_cache: See `XLSTMBlocksModel.forward`.
            output_hidden_states: See there.
            logits_to_keep: Number of last positions whose logits are wanted; 0 for all.
            return_dict: False for a tuple.
            **kwargs: Passed on to the loss, such as `num_items_in_batch`.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        hidden = output.last_hidden_state
        logits = at_least_fp32(self.lm_head(hidden[:, -logits_to_keep:]))
        logits = soft_cap(logits, self.config.logit_soft_cap)
        if self.config.vocab_tokens is not None:
            row = torch.arange(logits.shape[-1], device=logits.device)
            logits = logits.masked_fill(row >= self.config.vocab_tokens, -torch.inf)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
        return result if return_dict is not False else result.to_tuple()
