"""Calls of every kernel for the checker: odd sizes, strided inputs, boundaries, states, types.

`CASES` has, for each public function, functions of inputs and backend with their inputs.
"""

import math

import torch

from xlstm_kernels import (
    add_norm,
    conv_qkv_and_gates,
    gated_activation,
    gated_activation_again,
    mlstm_chunkwise,
    mlstm_step,
    multihead_norm,
    multihead_norm_again,
    norm_gated_skip,
    norm_gated_skip_again,
    qkv_and_gates,
    slstm_scan,
    slstm_step,
    softmax_gradient,
    softmax_statistics,
)
from xlstm_kernels.conv import conv


def strided(x):
    """The same values as every second row of a larger tensor, and behind an offset."""
    last = x.ndim - 2
    shape = [*x.shape[:last], 2 * x.shape[last] + 1, x.shape[-1]]
    return torch.full(shape, math.nan, dtype=x.dtype)[..., 1::2, :].copy_(x)


def documents(b, s):
    """Boundaries at the first token, at neighbours and in the middle, others in each row."""
    starts = torch.zeros(b, s, dtype=torch.bool)
    for row in range(b):
        starts[row, [0, s // 3, min(s // 3 + 1, s - 1), (row + 1) * s // (b + 1)]] = row != 1
    return starts


def mlstm_case(s, qk, v, b=2, heads=2, dtype=torch.float32, state=False, views=False, **options):
    torch.manual_seed(0)
    x = {
        name: torch.randn(b, heads, s, d).to(dtype)
        for name, d in {"q": qk, "k": qk, "v": v}.items()
    }
    if views:
        x = {name: strided(one) for name, one in x.items()}
    x |= {"i": torch.randn(b, heads, s), "f": torch.randn(b, heads, s) + 2}
    if state:
        x |= {"C": torch.randn(b, heads, qk, v), "n": torch.randn(b, heads, qk)}
        x["m"] = torch.randn(b, heads)

    def call(x, backend):
        names = ("q", "k", "v", "i", "f")
        carried = tuple(x[k] for k in "Cnm") if state else None
        more = options if backend == "triton" else options | {"states_dtype": None}
        result = mlstm_chunkwise(
            *(x[k] for k in names), carried, backend=backend, return_last_state=state, **more
        )
        if not state:
            return {"h": result}
        return {"h": result[0], **dict(zip("Cnm", result[1], strict=True))}

    return call, x


def step_case(qk, v, b=2, heads=3, dtype=torch.float32, **options):
    torch.manual_seed(0)
    x = {name: torch.randn(b, heads, d).to(dtype) for name, d in {"q": qk, "k": qk, "v": v}.items()}
    x |= {"i": torch.randn(b, heads), "f": torch.randn(b, heads)}
    x |= {"C": torch.randn(b, heads, qk, v), "n": torch.randn(b, heads, qk)}
    x["m"] = torch.randn(b, heads)

    def call(x, backend):
        state = [x[k].detach().clone() for k in "Cnm"]
        h = mlstm_step(*(x[k].detach() for k in "qkvif"), state, backend=backend, **options)
        return {"h": h, **dict(zip("Cnm", state, strict=True))}

    return call, x


def slstm_case(s, d, b=3, heads=2, dtype=torch.float32, state=False, on="triton", **options):
    """`on`: the backend in the place of Triton's usual one."""
    torch.manual_seed(0)
    x = {"x": torch.randn(b, s, 4, heads, d), "R": torch.randn(4, heads, d, d) * d**-0.5}
    x["bias"] = torch.randn(4, heads, d)
    x = {name: one.to(dtype) for name, one in x.items()}
    if state:
        h, c, n, m = torch.randn(4, b, heads, d)
        x |= {"h0": h.tanh(), "c": c, "n": n.exp(), "m": m}

    def call(x, backend):
        carried = (x["h0"], x["c"], x["n"], x["m"]) if state else None
        backend = on if backend == "triton" else backend
        result = slstm_scan(
            x["x"], x["R"], x["bias"], carried, return_last_state=True, backend=backend, **options
        )
        return {"h": result[0], **dict(zip(("h1", "c", "n", "m"), result[1], strict=True))}

    return call, x


def slstm_step_case(d, b=3, heads=2, dtype=torch.float32, **options):
    torch.manual_seed(0)
    x = {"x": torch.randn(b, 4, heads, d), "R": torch.randn(4, heads, d, d) * d**-0.5}
    x["bias"] = torch.randn(4, heads, d)
    x = {name: one.to(dtype) for name, one in x.items()}
    h, c, n, m = torch.randn(4, b, heads, d)
    x |= {"h0": h.tanh(), "c": c, "n": n.exp(), "m": m}
    x["n"][0] = 0  # a fresh row

    def call(x, backend):
        state = [x[k].detach().clone() for k in ("h0", "c", "n", "m")]
        h = slstm_step(*(x[k].detach() for k in ("x", "R", "bias")), state, backend=backend,
                       **options)  # fmt: skip
        return {"h": h, **dict(zip(("h1", "c", "n", "m"), state, strict=True))}

    return call, x


def conv_case(s, c, width=4, b=2, dtype=torch.float32, state=False, **options):
    torch.manual_seed(0)
    x = {"x": torch.randn(b, s, c), "w": torch.randn(c, width), "bias": torch.randn(c)}
    if state:
        x["before"] = torch.randn(b, c, width - 1)
    x = {name: one.to(dtype) for name, one in x.items()}

    def call(x, backend):
        y, after = conv.causal_conv1d(
            *(x[k] for k in ("x", "w", "bias")), x.get("before"), return_last_state=True,
            backend=backend, **options,
        )  # fmt: skip
        return {"y": y, "after": after}

    return call, x


def qkv_case(s, blocks, heads, gates, b=2, dtype=torch.float32):
    inner = 4 * blocks
    x = {"convolved": torch.randn(b, s, inner), "x": torch.randn(b, s, 2 * inner)}
    x |= {"blocks": torch.randn(3 * blocks, 4, 4), "gates": torch.randn(gates, 3 * inner)}
    x = {name: one.to(dtype) for name, one in x.items()}

    def call(x, backend):
        inputs = x["convolved"], x["x"][..., inner:], x["blocks"], x["gates"]
        results = qkv_and_gates(*inputs, heads, backend=backend)
        return dict(zip(("q", "k", "v", "preacts"), results, strict=True))

    return call, x


def conv_qkv_case(s, blocks, heads, gates, b=2, dtype=torch.float32, state=False, **options):
    inner = 4 * blocks
    x = {"packed": torch.randn(b, s, 2 * inner), "taps": torch.randn(inner, 4)}
    x |= {"bias": torch.randn(inner), "blocks": torch.randn(3 * blocks, 4, 4)}
    x |= {"gates": torch.randn(gates, 3 * inner)}
    x |= {"before": torch.randn(b, inner, 3)} if state else {}
    x = {name: one.to(dtype) for name, one in x.items()}

    def call(x, backend):
        inputs = (x[name] for name in ("packed", "taps", "bias", "blocks", "gates"))
        results = conv_qkv_and_gates(*inputs, heads, x.get("before"), backend=backend, **options)
        names = "convolved", "beside", "q", "k", "v", "preacts"
        return dict(zip(names, results, strict=True))

    return call, x


def norm_skip_case(s, d, b=2, heads=3, dtype=torch.float32):
    width = heads * d
    x = {"h": torch.randn(b, heads, s, d), "weight": torch.randn(width)}
    x |= {"skip": torch.randn(width), "x": torch.randn(s, b, width)}
    x |= {"gate": torch.randn(s, b, 2 * width)}
    x = {name: one.to(dtype) for name, one in x.items()}

    def call(x, backend):
        gate = x["gate"][..., width:]
        inputs = x["h"], x["weight"], "layernorm", 1e-5, x["skip"], x["x"], gate
        return {"y": norm_gated_skip(*inputs, backend=backend)}

    return call, x


def norm_case(s, d, b=2, heads=3, kind="layernorm", dtype=torch.float32, gated=True):
    """Inputs as the 7B-style block has them: the cell's order of axes, and a slice of a product."""
    torch.manual_seed(0)
    x = {"x": torch.randn(b, heads, s, d).to(dtype).permute(2, 0, 1, 3)}
    x["weight"] = torch.randn(heads * d)
    if gated:
        x["gate"] = torch.randn(s, b, 2 * heads, d).to(dtype)[:, :, heads:]

    def call(x, backend):
        return {
            "y": multihead_norm(
                x["x"], x["weight"], kind, 1e-3, gate=x.get("gate"), backend=backend
            )
        }

    return call, x


def sum_case(rows, d, kind="rmsnorm", dtype=torch.float32):
    torch.manual_seed(0)
    x = {name: torch.randn(rows, d).to(dtype) for name in ("x", "added")}
    x["weight"] = torch.randn(d)

    def call(x, backend):
        given = x["x"], x["added"], x["weight"], kind, 1e-3
        return dict(zip(("total", "y"), add_norm(*given, backend=backend), strict=True))

    return call, x


def gated_case(rows, width, activation="silu", dtype=torch.float32):
    torch.manual_seed(0)

    def call(x, backend):
        return {"y": gated_activation(x["x"], activation, backend=backend)}

    return call, {"x": torch.randn(rows, 2 * width).to(dtype)}


def again_case(function, again, d_y, **inputs):
    """A backward pass that leaves the result as well, in the memory of its gradient."""

    def call(x, backend):
        d_y, given = x["d_y"].detach().clone(), [x[name].detach() for name in inputs]
        if backend == "triton":
            gradients = again(d_y, *given)
        else:
            y = function(*(one.requires_grad_() for one in given))
            gradients, d_y = torch.autograd.grad(y, given, d_y), y.detach()
        return {"y": d_y} | {f"d_{name}": d for name, d in zip(inputs, gradients, strict=True)}

    return call, inputs | {"d_y": d_y}


def gated_again_case(rows, width, activation="silu", dtype=torch.float32):
    torch.manual_seed(0)
    return again_case(
        lambda x: gated_activation(x, activation, backend="torch"),
        lambda d_y, x: [gated_activation_again(d_y, x, activation)],
        torch.randn(rows, width).to(dtype),
        x=torch.randn(rows, 2 * width).to(dtype),
    )


def norm_again_case(s, d, b=2, heads=3, dtype=torch.float32):
    torch.manual_seed(0)
    wide = torch.randn(s, b, 2 * heads, d).to(dtype).permute(1, 2, 0, 3)
    options, by_head = ("layernorm", 1e-3), {"layout": "by head", "backend": "torch"}
    return again_case(
        lambda x, weight, gate: multihead_norm(x, weight, *options, gate=gate, **by_head),
        lambda d_y, x, weight, gate: multihead_norm_again(d_y, x, weight, *options, gate),
        torch.randn(s * b, heads * d).to(dtype),
        **{"x": wide[:, heads:], "weight": torch.randn(heads * d), "gate": wide[:, :heads]},
    )


def norm_skip_again_case(s, d, b=2, heads=3, dtype=torch.float32):
    torch.manual_seed(0)
    width, options = heads * d, ("layernorm", 1e-3)
    wide = torch.randn(s, b, 2 * width).to(dtype)
    return again_case(
        lambda h, weight, *rest: norm_gated_skip(h, weight, *options, *rest, backend="torch"),
        lambda d_y, h, weight, *rest: norm_gated_skip_again(d_y, h, weight, *options, *rest),
        torch.randn(s, b, width).to(dtype),
        **{"h": torch.randn(b, heads, s, d).to(dtype), "weight": torch.randn(width)},
        **{"skip": torch.randn(width), "x": wide[..., width:], "gate": wide[..., :width]},
    )


def loss_case(rows, width, cap, dtype=torch.float32):
    torch.manual_seed(0)
    labels = torch.randint(-width, 2 * width, (rows,))

    def call(x, backend):
        logits = x["logits"].detach()
        shift, total, chosen = softmax_statistics(logits, labels, cap, backend=backend)
        log_total = total.log() + shift
        given = log_total, x["grad"].detach(), cap
        d = softmax_gradient(logits.clone(), labels, *given, backend=backend)
        return {"log_total": log_total, "chosen": chosen, "d": d}

    return call, {"logits": torch.randn(rows, width).to(dtype), "grad": torch.randn(rows)}


HALF = {"dtype": torch.bfloat16}
CASES = {
    "mlstm_chunkwise": {
        "one token": mlstm_case(1, 16, 16),
        "few chunks": mlstm_case(20, 24, 40, chunk_size=16, state=True, views=True),
        "segments": mlstm_case(75, 20, 24, b=1, chunk_size=16, state=True),
        "documents": mlstm_case(
            70, 24, 20, b=3, chunk_size=32, state=True, boundaries=documents(3, 70)
        ),
        "wide heads": mlstm_case(
            70, 200, 16, b=1, chunk_size=64, boundaries=documents(1, 70), views=True
        ),
        "wide heads, bf16": mlstm_case(130, 512, 16, b=1, heads=1, chunk_size=128, **HALF),
        "sigmoid, bare": mlstm_case(50, 16, 32, chunk_size=16, gate="sigmoid", normalize=False),
        "bf16": mlstm_case(
            70, 80, 144, b=1, heads=1, chunk_size=32, boundaries=documents(1, 70), **HALF
        ),
        "bf16 states": mlstm_case(
            64, 32, 32, chunk_size=16, states_dtype=torch.bfloat16, views=True, **HALF
        ),
    },
    "mlstm_step": {
        "odd": step_case(20, 28),
        "sigmoid, bare": step_case(16, 72, gate="sigmoid", normalize=False),
        "bf16": step_case(64, 48, **HALF),
    },
    "slstm_scan": {
        "one token": slstm_case(1, 16),
        "odd": slstm_case(7, 20, state=True),
        "documents": slstm_case(9, 32, boundaries=documents(3, 9), state=True),
        "exp": slstm_case(5, 48, forget_gate="exp", boundaries=documents(3, 5)),
        "wide": slstm_case(4, 200, b=2, heads=1, state=True, boundaries=documents(2, 4)),
        "bf16": slstm_case(6, 64, b=17, heads=1, **HALF),
        "wide bf16": slstm_case(3, 272, b=2, heads=1, **HALF),
        "persistent": slstm_case(
            4, 72, b=17, heads=1, on="persistent", state=True, boundaries=documents(17, 4)
        ),
    },
    "slstm_step": {
        "one tile": slstm_step_case(20),
        "tiles, exp": slstm_step_case(264, b=17, heads=1, forget_gate="exp"),
        "bf16": slstm_step_case(272, heads=1, **HALF),
    },
    "multihead_norm": {
        "odd": norm_case(37, 20),
        "skip": norm_skip_case(37, 20),
        "skip, bf16": norm_skip_case(9, 128, **HALF),
        "skip, result left": norm_skip_again_case(37, 20),
        "skip, result left, bf16": norm_skip_again_case(9, 128, **HALF),
        "rms, plain": norm_case(5, 700, kind="rmsnorm", gated=False),
        "bf16": norm_case(70, 128, **HALF),
        "sum": sum_case(37, 20),
        "sum, bf16": sum_case(5, 700, "layernorm", **HALF),
        "result left": norm_again_case(37, 20),
        "result left, bf16": norm_again_case(9, 128, **HALF),
    },
    "gated_activation": {
        "odd": gated_case(5, 20, "gelu"),
        "several tiles, bf16": gated_case(3, 1030, **HALF),
        "result left": gated_again_case(5, 20, "gelu"),
        "result left, bf16": gated_again_case(3, 1030, **HALF),
    },
    "cross_entropy": {
        "odd": loss_case(5, 70, 30.0),
        "several tiles, bf16": loss_case(3, 4100, None, **HALF),
    },
    "qkv_and_gates": {
        "odd": qkv_case(35, 12, 3, 5),
        "bf16": qkv_case(17, 16, 2, 8, **HALF),
        "of a convolution": conv_qkv_case(35, 12, 3, 5, state=True, boundaries=documents(2, 35)),
        "of a convolution, bf16": conv_qkv_case(17, 16, 2, 8, **HALF),
    },
    "causal_conv1d": {
        "one token": conv_case(1, 16),
        "odd": conv_case(37, 20, state=True, activation="silu"),
        "documents": conv_case(40, 24, width=3, state=True, boundaries=documents(2, 40)),
        "bf16": conv_case(70, 136, activation="silu", boundaries=documents(2, 70), **HALF),
    },
}
