"""Part 1: every kernel in the very form that training uses, against fp64.

Each case runs twice, and its bits must be equal. Fresh memory is NaN meanwhile, so what a kernel
leaves out shows. Errors are relative in L2, one for each output and gradient.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu_proof.setting import Setting
from xlstm_kernels import (
    add_norm,
    causal_conv1d,
    conv_qkv_and_gates,
    gated_activation,
    mlstm_chunkwise,
    mlstm_step,
    multihead_norm,
    norm_gated_skip,
    self_check,
    slstm_scan,
    slstm_step,
    softmax_gradient,
    softmax_statistics,
)

# Relative L2 of one rounding to bf16 is 1.7e-3; a kernel rounds operands and results. Triton's
# interpreter rounds as a GPU does: there the 7B's mLSTM is off by 4e-3 at most with these inputs.
LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}

Function = Callable[[str, dict[str, Tensor]], dict[str, Tensor]]


def rows(setting: Setting) -> Iterator[dict]:
    """One row for each case and dtype."""
    for name, dtype, function, inputs in cases(setting):
        yield {"name": name, "dtype": str(dtype), **check(setting, function, inputs, LIMITS[dtype])}


def check(setting: Setting, function: Function, inputs: dict[str, Tensor], limit: float) -> dict:
    """Errors of one case, whether two runs have equal bits, and whether all is within the limit."""
    exact = differentiate(function, "torch", {n: _wide(x) for n, x in inputs.items()})
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty fills with NaN then
    try:
        first, second = (differentiate(function, setting.backend, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    errors = {name: _error(first[name], exact[name]) for name in exact}
    same = all(torch.equal(first[name], second[name]) for name in exact)
    worst = max(errors.values())
    return {"errors": errors, "worst": worst, "repeats": same, "ok": worst <= limit and same}


def differentiate(function: Function, backend: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, and gradients of a combination of those that have one.

    It is a random one, the same in every run, in numbers that bf16 has. One with an order in time
    would cancel in sums over tokens, and leave little but rounding in the gradients of gates.
    """
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    outputs = function(backend, leaves)
    found = {name: x.detach() for name, x in outputs.items()}
    smooth = {name: x for name, x in outputs.items() if x.requires_grad}
    if smooth:
        generator = torch.Generator().manual_seed(1)
        upstream = [
            torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype)
            for x in smooth.values()
        ]
        wanted = {name: x for name, x in leaves.items() if x.requires_grad}
        results, given = list(smooth.values()), list(wanted.values())
        gradients = torch.autograd.grad(results, given, upstream, allow_unused=True)
        pairs = zip(wanted, gradients, strict=True)
        found |= {f"d_{name}": d for name, d in pairs if d is not None}
    return found


def _wide(x: Tensor) -> Tensor:
    """The same values in fp64, with the same strides."""
    return x.double() if x.is_floating_point() else x


def _error(got: Tensor, exact: Tensor) -> float:
    if not got.isfinite().all():
        return float("inf")
    norm = exact.double().norm().clamp(min=1e-30)
    return float((got.double() - exact.double()).norm() / norm)


def cases(setting: Setting) -> Iterator[tuple[str, torch.dtype, Function, dict[str, Tensor]]]:
    """Name, dtype, function and inputs of every case."""
    for dtype in (torch.bfloat16, torch.float32):
        for states in ("fp32", "bf16") if dtype == torch.bfloat16 else ("fp32",):
            name = f"mLSTM of the 7B, {states} states"
            yield name, dtype, _mlstm(setting, states), mlstm_inputs(setting, dtype)
        if dtype == torch.bfloat16:
            # The tiles of one head do not fill a GPU: the sequence is cut into segments.
            one = mlstm_inputs(setting, dtype, heads=1, length=setting.pick(2048, 144))
            yield "mLSTM of the 7B, one head", dtype, _mlstm(setting, "bf16"), one
            large = setting.pick(1024, 24)
            inputs = mlstm_inputs(setting, dtype, setting.pick(4, 2), large, large, cap=None)
            yield "mLSTM of the 1.3B", dtype, _mlstm(setting, "bf16", cap=None), inputs
        yield "mLSTM step", dtype, _mlstm_step, _step_inputs(setting, dtype)
        for d in (192, 256, 512):
            d = setting.pick(d, d // 24)
            yield f"sLSTM {d}", dtype, _slstm(setting), _slstm_inputs(setting, d, dtype)
            yield f"sLSTM step {d}", dtype, _slstm_step, _slstm_inputs(setting, d, dtype)
        yield "head norm and gate", dtype, _head_norm, _norm_inputs(setting, dtype)
        yield "head norm, skip and gate", dtype, _norm_skip, _skip_inputs(setting, dtype)
        yield "block norm", dtype, _block_norm, _block_norm_inputs(setting, dtype)
        yield "sum and norm", dtype, _sum_and_norm, _sum_inputs(setting, dtype)
        yield "convolution", dtype, _conv(setting), _conv_inputs(setting, dtype)
        yield "convolution, q, k, v and gates", dtype, _qkv(setting), _qkv_inputs(setting, dtype)
        yield "SwiGLU", dtype, _swiglu, _swiglu_inputs(setting, dtype)
        yield "loss", dtype, _loss, _loss_inputs(setting, dtype)


def _normal(setting: Setting, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).to(setting.device)


def documents(setting: Setting, rows: int, length: int) -> Tensor:
    """Boundaries at the first token, at two neighbours and before."""
    starts = self_check.three_documents(length).repeat(rows, 1)
    starts[:, length // 3 + 1] = True
    return starts.to(setting.device)


def mlstm_inputs(
    setting: Setting,
    dtype: torch.dtype,
    heads: int | None = None,
    qk: int | None = None,
    v: int | None = None,
    cap: float | None = 15.0,
    length: int | None = None,
) -> dict[str, Tensor]:
    """q, k and v as views of one packed projection `[s, b, width]`, and gates.

    Sizes are those of the 7B unless given. The numbers are those of `self_check.mlstm_inputs`,
    whose n.q is never near zero: a quotient by a number that is all rounding would show nothing of
    a kernel. What a token writes lasts for many chunks, so that states count.
    """
    heads, s = heads or setting.pick(8, 2), length or setting.pick(2048, 48)
    qk, v = qk or setting.pick(256, 8), v or setting.pick(512, 16)
    drawn = self_check.mlstm_inputs(heads, s, qk, v, cap)
    tokens = [drawn[name].transpose(0, 1).flatten(1) for name in ("q", "k", "v", "v")]
    packed = torch.cat(tokens, dim=1)[:, None].to(setting.device, dtype)
    parts = packed.split([heads * qk, heads * qk, heads * v, heads * v], dim=-1)
    q, k, value = (
        part.view(s, 1, heads, -1).permute(1, 2, 0, 3) for part in parts[:3]
    )  # strided, as in training
    gates = (drawn[f"{name} gate"][None].to(setting.device) for name in ("input", "forget"))
    return dict(zip("qkvif", (q, k, value, *gates), strict=True))


def _mlstm(setting: Setting, states: str, cap: float | None = 15.0) -> Function:
    def call(backend: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
        s = x["q"].shape[2]
        kept = torch.bfloat16 if states == "bf16" else torch.float32
        h = mlstm_chunkwise(
            *(x[name] for name in "qkvif"),
            boundaries=documents(setting, 1, s),
            gate_soft_cap=cap,
            states_dtype=kept,
            backend=backend,
        )
        return {"h": h}

    return call


def _step_inputs(setting: Setting, dtype: torch.dtype) -> dict[str, Tensor]:
    b, heads, qk, v = 4, setting.pick(8, 2), setting.pick(256, 8), setting.pick(512, 16)
    rng = setting.generator()
    shapes = {
        "q": (qk,),
        "k": (qk,),
        "v": (v,),
        "i": (),
        "f": (),
        "C": (qk, v),
        "n": (qk,),
        "m": (),
    }
    made = {name: _normal(setting, rng, b, heads, *shape) for name, shape in shapes.items()}
    return made | {name: made[name].to(dtype) for name in "qkv"}


def _mlstm_step(backend: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
    state = tuple(x[name].detach().clone() for name in "Cnm")
    token = (x[name].detach() for name in "qkvif")
    h = mlstm_step(*token, state, gate_soft_cap=15.0, backend=backend)
    return {"h": h, **dict(zip("Cnm", state, strict=True))}


def _slstm_inputs(setting: Setting, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    # Long enough for two graphs of large heads, and a rest that is launched.
    b, heads, s = 3, setting.pick(4, 2), setting.pick(300, 12)
    rng = setting.generator()
    made = {
        "x": _normal(setting, rng, b, s, 4, heads, d),
        "R": _normal(setting, rng, 4, heads, d, d) * d**-0.5,
        "bias": _normal(setting, rng, 4, heads, d),
    }
    return {name: x.to(dtype) for name, x in made.items()}


def _slstm(setting: Setting) -> Function:
    def call(backend: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
        starts = documents(setting, *x["x"].shape[:2])
        found = {}
        for gate in ("sigmoid", "exp"):
            found[gate] = slstm_scan(
                x["x"], x["R"], x["bias"], boundaries=starts, forget_gate=gate, backend=backend
            )
        return found

    return call


def _slstm_step(backend: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
    gates, weight, bias = (x[name].detach() for name in ("x", "R", "bias"))
    b, s, _, heads, d = gates.shape
    wide = torch.float64 if gates.dtype == torch.float64 else torch.float32
    state = tuple(gates.new_zeros(b, heads, d, dtype=wide) for _ in range(4))
    for t in range(min(s, 4)):
        h = slstm_step(gates[:, t], weight, bias, state, backend=backend)
    return {"h": h, **dict(zip(("state h", "c", "n", "m"), state, strict=True))}


def _norm_inputs(setting: Setting, dtype: torch.dtype) -> dict[str, Tensor]:
    s, heads, d = setting.pick(1024, 12), setting.pick(8, 2), setting.pick(512, 16)
    rng = setting.generator()
    x = _normal(setting, rng, 1, heads, s, d).to(dtype)
    gate = _normal(setting, rng, s, 1, 2 * heads, d).to(dtype)[:, :, heads:].permute(1, 2, 0, 3)
    return {"x": x, "weight": _normal(setting, rng, heads * d).to(dtype), "gate": gate}


def _head_norm(backend: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
    given = x["x"], x["weight"], "layernorm", 1e-6
    return {"y": multihead_norm(*given, gate=x["gate"], layout="by head", backend=backend)}


def _skip_inputs(setting: Setting, dtype: torch.dtype) -> dict[str, Tensor]:
    s, heads, d = setting.pick(1024, 12), setting.pick(4, 2), setting.pick(1024, 16)
    rng, width = setting.generator(), heads * d
    made = {name: _normal(setting, rng, width).to(dtype) for name in ("weight", "skip")}
    h, x, gate = (_normal(setting, rng, s, 1, 2 * width).to(dtype)[..., width:] for _ in range(3))
    return {"h": h.unflatten(2, (heads, d)).permute(1, 2, 0, 3), **made, "x": x, "gate": gate}


def _norm_skip(backend: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
    rest = x["skip"], x["x"], x["gate"]
    return {"y": norm_gated_skip(x["h"], x["weight"], "layernorm", 1e-5, *rest, backend=backend)}


def _block_norm_inputs(setting: Setting, dtype: torch.dtype) -> dict[str, Tensor]:
    rng, d = setting.generator(), setting.pick(4096, 48)
    x = _normal(setting, rng, setting.pick(1024, 12), 1, d).to(dtype)
    return {"x": x, "weight": _normal(setting, rng, d).to(dtype)}


def _block_norm(backend: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
    given = x["x"], x["weight"], "rmsnorm", 1e-6
    return {"y": multihead_norm(*given, layout="row", backend=backend)}


def _sum_inputs(setting: Setting, dtype: torch.dtype) -> dict[str, Tensor]:
    found = _block_norm_inputs(setting, dtype)
    return found | {"added": found["x"].flip(0).contiguous()}


def _sum_and_norm(backend: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
    both = add_norm(x["x"], x["added"], x["weight"], "rmsnorm", 1e-6, backend=backend)
    return dict(zip(("total", "y"), both, strict=True))


def _conv_inputs(setting: Setting, dtype: torch.dtype) -> dict[str, Tensor]:
    b, s, c, rng = 2, setting.pick(1024, 20), setting.pick(1536, 24), setting.generator()
    shapes = {"x": (b, s, c), "weight": (c, 4), "bias": (c,)}
    return {name: _normal(setting, rng, *shape).to(dtype) for name, shape in shapes.items()}


def _conv(setting: Setting) -> Function:
    def call(backend: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
        starts = documents(setting, *x["x"].shape[:2])
        given = x["x"], x["weight"], x["bias"]
        y = causal_conv1d(*given, activation="silu", boundaries=starts, backend=backend)
        return {"y": y}

    return call


def _qkv_inputs(setting: Setting, dtype: torch.dtype) -> dict[str, Tensor]:
    s, inner, rng = setting.pick(1024, 20), setting.pick(4096, 64), setting.generator()
    shapes = {
        "packed": (s, 1, 2 * inner),
        "conv": (inner, 4),
        "bias": (inner,),
        "blocks": (3 * inner // 4, 4, 4),
        "gates": (2 * setting.pick(4, 2), 3 * inner),
    }
    made = {name: _normal(setting, rng, *shape) for name, shape in shapes.items()}
    made["gates"] /= inner**0.5
    made["packed"] = made["packed"].transpose(0, 1)
    return {name: x.to(dtype) for name, x in made.items()}


def _qkv(setting: Setting) -> Function:
    def call(backend: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
        starts = documents(setting, *x["packed"].shape[:2])
        given = (x[name] for name in ("packed", "conv", "bias", "blocks", "gates"))
        heads = setting.pick(4, 2)
        results = conv_qkv_and_gates(*given, heads, boundaries=starts, backend=backend)
        names = ("convolved", "beside", "q", "k", "v", "preacts")
        return dict(zip(names, results, strict=True))

    return call


def _swiglu_inputs(setting: Setting, dtype: torch.dtype) -> dict[str, Tensor]:
    shape = setting.pick(1024, 12), 2 * setting.pick(10944, 40)
    return {"x": _normal(setting, setting.generator(), *shape).to(dtype)}


def _swiglu(backend: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"y": gated_activation(x["x"], "silu", backend=backend)}


def _loss_inputs(setting: Setting, dtype: torch.dtype) -> dict[str, Tensor]:
    count, width, rng = setting.pick(1024, 12), setting.pick(50304, 70), setting.generator()
    logits = (8 * _normal(setting, rng, count, width)).to(dtype)
    labels = torch.randint(0, width, (count,), generator=rng).to(setting.device)
    return {"logits": logits, "labels": labels, "grad": _normal(setting, rng, count)}


def _loss(backend: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
    logits, labels = x["logits"].detach(), x["labels"]
    largest, total, chosen = softmax_statistics(logits, labels, 30.0, backend=backend)
    log_total = total.log() + largest
    given = labels, log_total, x["grad"].detach(), 30.0
    return {
        "loss": log_total - chosen,
        "gradient": softmax_gradient(logits.clone(), *given, backend=backend),
    }
