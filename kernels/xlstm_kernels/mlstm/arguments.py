"""Types and argument checks that the mLSTM functions share."""

from typing import NamedTuple

from torch import Tensor

from xlstm_kernels.common.checks import (
    check_choice,
    check_float,
    check_like,
    check_state,
    compute_dtype,
)

GATES = ("exp", "sigmoid")

State = tuple[Tensor, Tensor, Tensor]
"""(C [b, heads, qk_dim, v_dim], n [b, heads, qk_dim], m [b, heads])."""


class Inputs(NamedTuple):
    """What an mLSTM reads at every token."""

    q: Tensor  # [b, heads, s, qk_dim]
    k: Tensor  # [b, heads, s, qk_dim]
    v: Tensor  # [b, heads, s, v_dim]
    igate: Tensor  # [b, heads, s] pre-activations
    fgate: Tensor  # [b, heads, s] pre-activations


class Gradients(NamedTuple):
    """Gradients of `Inputs` in their dtypes, and of the initial state's C and n (m has none)."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    d_igate: Tensor
    d_fgate: Tensor
    dC: Tensor | None
    dn: Tensor | None


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    state: State | None,
    gate: str,
    *,
    time: bool,
) -> None:
    """Check shapes, dtypes and devices; `time` says whether there is a sequence axis s.

    Raises ValueError with the value, the rule and the remedy.
    """
    axes = "[b, heads, s" if time else "[b, heads"
    check_float("q", q, 4 if time else 3, f"{axes}, qk_dim]")
    check_float("v", v, 4 if time else 3, f"{axes}, v_dim]")
    lead = tuple(q.shape[:-1])
    check_like("k", k, tuple(q.shape), f"{axes}, qk_dim]", q)
    check_like("v", v, (*lead, v.shape[-1]), f"{axes}, v_dim]", q)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(
                f"{name} has dtype {tensor.dtype} and q {q.dtype}, but q, k and v must have one "
                f"dtype; convert {name} to {q.dtype}"
            )
    check_like("igate_preact", igate_preact, lead, f"{axes}]", q)
    check_like("fgate_preact", fgate_preact, lead, f"{axes}]", q)
    check_choice("gate", gate, GATES)
    if state is not None:
        batch, heads, qk_dim, v_dim = *q.shape[:2], q.shape[-1], v.shape[-1]
        parts = {
            "C": ((batch, heads, qk_dim, v_dim), "[b, heads, qk_dim, v_dim]"),
            "n": ((batch, heads, qk_dim), "[b, heads, qk_dim]"),
            "m": ((batch, heads), "[b, heads]"),
        }
        check_state(state, parts, q)


def check_soft_cap(cap: float | None) -> None:
    """Require a soft cap of gate pre-activations to be positive and finite, or None."""
    if cap is not None and not 0 < cap < float("inf"):
        raise ValueError(
            f"gate_soft_cap={cap!r} must be positive and finite; use None for no cap, or 15.0 as "
            "in xLSTM 7B"
        )


def soft_cap(preact: Tensor, cap: float | None, like: Tensor) -> Tensor:
    """`cap * tanh(preact / cap)` in the dtype that gates of inputs such as `like` have."""
    if cap is None:
        return preact
    return cap * (preact.to(compute_dtype(like.dtype)) / cap).tanh()
