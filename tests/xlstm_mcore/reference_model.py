"""The whole model from its equations, in fp64, on global tensors and without Megatron.

Sources: arXiv 2405.04517 (figures 10, 11 and appendix A) and arXiv 2503.13427 (section 3). The
cells are the step recurrences of `xlstm_kernels`, their specification.
"""

import torch
import torch.nn.functional as F

from xlstm_kernels.mlstm.reference import mlstm_recurrence
from xlstm_kernels.slstm.reference import lstm_recurrence, slstm_recurrence


def cap(x, limit):
    return x if limit is None else limit * torch.tanh(x / limit)


def norm(x, weight, config):
    if config.norm == "layernorm":
        return F.layer_norm(x, weight.shape, weight, None, config.norm_eps)
    return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight


def head_norm(h, weight, config):
    """Norm of every head of h [b, s, heads, d]; returns [b, s, heads * d]."""
    if config.head_norm == "none":
        return h.flatten(2) * weight
    if config.head_norm == "layernorm":
        h = h - h.mean(-1, keepdim=True)
    h = h / (h.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return h.flatten(2) * weight


def split_heads(x, heads):  # [b, s, heads * d] -> [b, heads, s, d]
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def conv(x, weight, bias, boundaries):
    """Causal depthwise convolution with SiLU, one document at a time, tap by tap."""
    b, s, _ = x.shape
    width = weight.shape[1]
    out = bias.expand_as(x).clone()
    for row in range(b):
        for t in range(s):
            for back in range(width):
                if back and bool(boundaries[row, t - back + 1]):
                    break  # a document starts between tap and token
                if t - back < 0:
                    break
                tap = torch.zeros_like(out)
                tap[row, t] = x[row, t - back] * weight[:, width - 1 - back]
                out = out + tap
    return F.silu(out)


def mlstm_cell(q, k, v, i, f, config, boundaries):
    if not config.mlstm_input_gate:
        i = torch.full_like(i, torch.inf if config.mlstm_gate == "sigmoid" else 0.0)
    if not config.mlstm_forget_gate:
        f = torch.full_like(f, torch.inf)
    h, _ = mlstm_recurrence(
        q,
        k,
        v,
        i,
        f,
        boundaries=boundaries,
        gate=config.mlstm_gate,
        normalize=config.mlstm_normalize,
        eps=config.cell_eps,
    )
    return h.transpose(1, 2)


def gate_input(x, w, gate, config):
    """What an mLSTM gate gets from its input; nothing where the forget gate is a bias alone."""
    if gate == "f" and config.mlstm_forget_gate == "bias":
        return x.new_zeros(*x.shape[:2], config.num_heads)
    return x @ w(f"{gate}gate.weight").T


def mlstm_7b(x, w, config, boundaries):
    heads = config.num_heads
    q, k, v = (split_heads(x @ w(f"{n}_proj.weight").T, heads) for n in "qkv")
    i, f = (
        cap(gate_input(x, w, g, config) + w(f"{g}gate.bias"), config.gate_soft_cap).transpose(1, 2)
        for g in "if"
    )
    h = mlstm_cell(q, k, v, i, f, config, boundaries)
    h = head_norm(h, w("head_norm.weight"), config)
    return (torch.sigmoid(x @ w("ogate.weight").T) * h) @ w("out_proj.weight").T


def mlstm_classic(x, w, config, boundaries):
    heads = config.num_heads
    x_m, z = x @ w("up_proj.weight").T, x @ w("z_proj.weight").T
    x_c = conv(x_m, w("conv.weight"), w("conv.bias"), boundaries) if config.conv_width else x_m

    def blocks(t, name):
        weight = w(name)
        return torch.einsum("bsni,noi->bsno", t.unflatten(-1, (-1, weight.shape[-1])), weight)

    q, k, v = (
        blocks(t, f"{n}_proj.weight").flatten(2) for t, n in ((x_c, "q"), (x_c, "k"), (x_m, "v"))
    )
    seen = torch.cat((q, k, v), dim=-1)
    i, f = ((gate_input(seen, w, g, config) + w(f"{g}gate.bias")).transpose(1, 2) for g in "if")
    q, k, v = (split_heads(t, heads) for t in (q, k, v))
    h = mlstm_cell(q, k, v, i, f, config, boundaries)
    h = head_norm(h, w("head_norm.weight"), config)
    return ((h + w("learnable_skip") * x_c) * F.silu(z)) @ w("out_proj.weight").T


def slstm(x, w, config, boundaries, letter="s"):
    taps = config.conv_width if config.slstm_conv_width is None else config.slstm_conv_width
    x_c = conv(x, w("conv.weight"), w("conv.bias"), boundaries) if taps else x

    def headwise(t, name):
        return torch.einsum("bshi,hoi->bsho", t.unflatten(-1, (config.num_heads, -1)), w(name))

    sources = {"igate": x_c, "fgate": x_c, "zgate": x, "ogate": x}
    preacts = torch.stack([headwise(t, f"{g}.weight") for g, t in sources.items()], dim=2)
    cell = preacts, w("recurrent_weight"), w("bias")
    if letter == "l":
        h, _ = lstm_recurrence(*cell, boundaries=boundaries)
    else:
        gates = {"forget_gate": config.slstm_forget_gate, "input_gate": config.slstm_input_gate}
        h, _ = slstm_recurrence(*cell, boundaries=boundaries, **gates)
    return head_norm(h, w("head_norm.weight"), config)


def lstm(x, w, config, boundaries):
    return slstm(x, w, config, boundaries, letter="l")


def mamba2(x, w, config, boundaries):
    """arXiv 2405.21060: S = exp(-dt A) S + dt x B^T, y = S C + D x, one token at a time."""
    projected = {n: x @ w(f"{n}_proj.weight").T for n in ("z", "x", "b", "c", "dt")}
    if config.conv_width:
        for n in "xbc":
            taps = w(f"{n}_conv.weight"), w(f"{n}_conv.bias")
            projected[n] = conv(projected[n], *taps, boundaries)
    values = projected["x"].unflatten(-1, (-1, config.ssm_head_dim))  # [b, s, heads, P]
    dt = F.softplus(projected["dt"] + w("dt_bias"))
    state = x.new_zeros(*values[:, 0].shape, config.ssm_state_dim)
    rows = []
    for t in range(x.shape[1]):
        state = state.masked_fill(boundaries[:, t, None, None, None], 0.0)
        decay = torch.exp(-dt[:, t] * w("a_log").exp())[..., None, None]
        write = torch.einsum("bhp,bn->bhpn", dt[:, t, :, None] * values[:, t], projected["b"][:, t])
        state = decay * state + write
        rows.append(torch.einsum("bhpn,bn->bhp", state, projected["c"][:, t]))
    y = torch.stack(rows, dim=1) + w("skip")[:, None] * values
    y = y.flatten(2) * F.silu(projected["z"])
    y = y / (y.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * w("gated_norm.weight")
    return y @ w("out_proj.weight").T


def attention(x, w, config, boundaries):
    """Softmax attention, one document, one head and one token at a time; RoPE as complex turns."""
    heads = config.attention_heads or config.num_heads
    kv_heads = config.attention_kv_heads or heads
    d = config.hidden_size // heads
    q, k, v = (
        (x @ w(f"{n}_proj.weight").T).unflatten(-1, (-1, d)) for n in "qkv"
    )  # [b, s, heads, d]
    speed = config.rotary_base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    rows = []
    for row in range(x.shape[0]):
        tokens, first = [], 0
        for t in range(x.shape[1]):
            if bool(boundaries[row, t]):
                first = t

            def turned(z, place, head, row=row):
                pairs = torch.complex(z[row, place, head, : d // 2], z[row, place, head, d // 2 :])
                return pairs * torch.exp(1j * (place - first) * speed)  # noqa: B023

            outs = []
            for head in range(heads):
                kv = head * kv_heads // heads
                here = turned(q, t, head)
                window = config.attention_window or x.shape[1]
                seen = [
                    j
                    for j in range(first, t + 1)
                    if t - j < window or j - first < config.attention_sinks
                ]
                scores = [(here * turned(k, j, kv).conj()).real.sum() / d**0.5 for j in seen]
                chance = torch.softmax(torch.stack(scores), dim=0)
                outs.append(chance @ v[row, seen, kv])
            tokens.append(torch.cat(outs))
        rows.append(torch.stack(tokens))
    return torch.stack(rows) @ w("out_proj.weight").T


def ffn(x, w, activation):
    gate, up = x @ w("gate_proj.weight").T, x @ w("up_proj.weight").T
    return (activation(gate) * up) @ w("down_proj.weight").T


def losses(weights, config, tokens, labels, boundaries):
    """Token losses [b, s] in nats, from global fp64 tensors `weights`."""
    x = weights["embedding.word_embeddings.weight"][tokens]
    mixers = {
        "M": mlstm_7b,
        "m": mlstm_classic,
        "s": slstm,
        "l": lstm,
        "d": mamba2,
        "*": attention,
    }
    activations = {"M": F.silu, "s": F.gelu, "l": F.gelu, "*": F.silu}
    for number, letter in enumerate(config.layer_letters):
        prefix = f"decoder.layers.{number}."
        y = norm(x, weights[f"{prefix}mixer_norm.weight"], config)
        y = mixers[letter](y, lambda n, p=prefix: weights[f"{p}mixer.{n}"], config, boundaries)
        x = x + y if config.residual else y
        if f"{prefix}ffn_norm.weight" in weights:
            y = norm(x, weights[f"{prefix}ffn_norm.weight"], config)
            y = ffn(y, lambda n, p=prefix: weights[f"{p}ffn.{n}"], activations[letter])
            x = x + y if config.residual else y
    x = norm(x, weights["decoder.final_norm.weight"], config)
    head = "embedding.word_embeddings.weight" if config.tie_embeddings else "output_layer.weight"
    logits = cap(x @ weights[head].T, config.logit_soft_cap)
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
