"""Do the kernels of a model compute what they should on this device?"""

import torch

from xlstm_kernels.self_check import (
    check_gated_activation,
    check_loss,
    check_mlstm,
    check_norm,
    check_slstm,
)
from xlstm_mcore.pattern import parse_pattern
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.dimensions import dimensions

HEADS = 1  # every head is computed alike; with more of them the reference takes longer


def compare_kernels(
    model: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    states_dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Compare a model's kernels with their fp64 references; see `xlstm_kernels.self_check`.

    Args:
        model: whose widths, gates, chunk size and backend are tried.
        device: where they run.
        dtype: what the model computes in.
        states_dtype: what its mLSTM cells keep their states in.

    Returns:
        One sentence for each tensor that differs; empty when all agree.
    """
    letters = set(parse_pattern(model.pattern).letters)
    sizes, heads = dimensions(model), model.num_heads
    widths = {"M": (sizes.qk, sizes.v), "m": (sizes.up, sizes.up)}
    problems = []
    for letter in sorted(letters & set(widths)):
        qk, v = widths[letter]
        problems += check_mlstm(
            device,
            dtype,
            qk_dim=qk // heads,
            v_dim=v // heads,
            heads=HEADS,
            chunk_size=model.chunk_size,
            gate_soft_cap=model.gate_soft_cap if letter == "M" else None,
            states_dtype=states_dtype,
            backend=model.kernel_backend,
            gate=model.mlstm_gate,
            normalize=model.mlstm_normalize,
            eps=model.cell_eps,
        )
    if "s" in letters:
        problems += check_slstm(
            device,
            dtype,
            head_dim=model.hidden_size // heads,
            heads=HEADS,
            backend=model.kernel_backend,
            forget_gate=model.slstm_forget_gate,
        )
    where = {"device": device, "dtype": dtype, "backend": model.kernel_backend}
    if letters & set("M*"):
        problems += check_gated_activation(width=sizes.ffn, activation="silu", **where)
    if letters & set("sl") and sizes.slstm_ffn:
        problems += check_gated_activation(width=sizes.slstm_ffn, activation="gelu", **where)
    problems += check_norm(width=model.hidden_size, kind=model.norm, eps=model.norm_eps, **where)
    problems += check_loss(width=model.vocab_size, soft_cap=model.logit_soft_cap, **where)
    return problems
