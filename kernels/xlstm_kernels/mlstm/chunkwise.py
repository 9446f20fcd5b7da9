"""mLSTM over a sequence: the public function in front of the chunkwise backends."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xlstm_kernels.common.backends import select_backend
from xlstm_kernels.common.checks import check_boundaries, check_choice, check_no_tangents
from xlstm_kernels.mlstm.arguments import State, check_arguments, check_soft_cap, soft_cap
from xlstm_kernels.mlstm.torch.chunkwise import mlstm_chunkwise_torch

if TYPE_CHECKING:
    from xlstm_kernels.mlstm.triton.tiles import MlstmConfig

STATES_DTYPES = (None, torch.float32, torch.bfloat16)


def mlstm_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    initial_state: State | None = None,
    *,
    chunk_size: int | None = None,
    return_last_state: bool = False,
    boundaries: Tensor | None = None,
    gate: str = "exp",
    normalize: bool = True,
    eps: float = 1e-6,
    gate_soft_cap: float | None = None,
    backend: str | None = None,
    states_dtype: torch.dtype | None = None,
    tiles: "MlstmConfig | None" = None,
) -> Tensor | tuple[Tensor, State]:
    """Hidden states of the mLSTM over a sequence.

    h = numerator / (max(|n.q|, exp(-m)) + eps), with m the running maximum of the step recurrence
    for every chunk size. Gates and states are computed in float32, in float64 for float64 q.
    Gradients are exact through h, C and n, into the initial C and n; m carries none.

    Args:
        q: Queries [b, heads, s, qk_dim]. They are scaled by qk_dim^-0.5 inside.
        k: Keys [b, heads, s, qk_dim] in the dtype of q.
        v: Values [b, heads, s, v_dim] in the dtype of q.
        igate_preact: Pre-activation of the input gate, [b, heads, s], of any float dtype.
        fgate_preact: Pre-activation of the forget gate, a sigmoid; likewise.
        initial_state: (C [b, heads, qk_dim, v_dim], n [b, heads, qk_dim], m [b, heads]), which
            stands for exp(m) C and exp(m) n. None means zeros, m included.
        chunk_size: The largest number of tokens in a chunk. None lets the backend choose.
        return_last_state: Whether the state after the last token is returned as well.
        boundaries: bool [b, s], True at the first token of a document: the state before it is
            forgotten.
        gate: Input gate, "exp" or "sigmoid". "sigmoid" has m = 0 everywhere (m of an initial state
            is ignored).
        normalize: False gives the numerator, in units of exp(m).
        eps: Added to the normalizer.
        gate_soft_cap: Makes both gate pre-activations x into cap * tanh(x / cap) first (xLSTM 7B,
            section 3). None means no cap.
        backend: "torch" or "triton"; None for the best one for the device, dtype and shape.
        states_dtype: What states between chunks are kept in, and their gradients: torch.float32 or
            torch.bfloat16. They are carried in the type of the computation. None means that type,
            on "triton" the dtype of q, to which products round the states in any case.
        tiles: Tile sizes for "triton" (None: those of its table). Other backends ignore it.

    Returns:
        h [b, heads, s, v_dim] in the dtype of q; with `return_last_state` (h, (C, n, m)).

    Raises:
        ValueError: For wrong shapes, dtypes, devices or options.
        NotImplementedError: For forward-mode differentiation.
    """
    state = initial_state or ()
    check_no_tangents("mlstm_chunkwise", q, k, v, igate_preact, fgate_preact, *state)
    check_arguments(q, k, v, igate_preact, fgate_preact, initial_state, gate, time=True)
    check_boundaries(boundaries, q.shape[0], q.shape[2], q)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(
            f"chunk_size={chunk_size!r} must be a positive integer; use a power of two such as 64, "
            "or None to let the backend choose"
        )
    check_choice("states_dtype", states_dtype, STATES_DTYPES)
    check_soft_cap(gate_soft_cap)
    qk_dim, v_dim = q.shape[-1], v.shape[-1]
    chosen = select_backend(
        "mlstm_chunkwise", backend, q, qk_dim=qk_dim, v_dim=v_dim, chunk_size=chunk_size
    )
    options = {
        "chunk_size": chunk_size,
        "return_last_state": return_last_state,
        "boundaries": boundaries,
        "gate": gate,
        "normalize": normalize,
        "eps": eps,
        "states_dtype": states_dtype,
    }
    if chosen == "triton":
        from xlstm_kernels.mlstm.triton.chunkwise import mlstm_chunkwise_triton

        options |= {"gate_soft_cap": gate_soft_cap, "tiles": tiles}
        return mlstm_chunkwise_triton(q, k, v, igate_preact, fgate_preact, initial_state, **options)
    igate, fgate = (soft_cap(x, gate_soft_cap, q) for x in (igate_preact, fgate_preact))
    return mlstm_chunkwise_torch(q, k, v, igate, fgate, initial_state, **options)
