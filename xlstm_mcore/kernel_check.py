"""Do the kernels of a model compute what they should on this device?"""

import torch

from xlstm_kernels.self_check import check_lstm, check_mlstm, check_slstm
from xlstm_kernels.self_check_layers import (
    ROWS,
    check_conv,
    check_gated_activation,
    check_loss,
    check_norm,
    check_norm_gated_skip,
    check_qkv_and_gates,
)
from xlstm_mcore.pattern import parse_pattern
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.dimensions import dimensions

HEADS = 1  # every head is computed alike; with more of them the reference takes longer


def compare_kernels(
    model: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    states_dtype: torch.dtype | None = None,
    slstm_form: str = "graphs",
    tokens: int = ROWS,
) -> list[str]:
    """Compare a model's kernels with their fp64 references; see `xlstm_kernels.self_check`.

    Args:
        model: whose widths, gates, chunk size and backend are tried.
        device: where they run.
        dtype: what the model computes in.
        states_dtype: what its mLSTM cells keep their states in; None: as the kernel chooses.
        slstm_form: `memory.slstm_form`; the persistent one is compared as well.
        tokens: that a rank's kernels see at once; on a CPU small calls take other kernels.

    Returns:
        One sentence for each tensor that differs; empty when all agree.
    """
    letters = set(parse_pattern(model.pattern).letters)
    sizes, heads = dimensions(model), model.num_heads
    where = {"device": device, "dtype": dtype, "backend": model.kernel_backend}
    large = {"tokens": tokens, **where}
    problems = []
    classic = {"gate": model.mlstm_gate, "normalize": model.mlstm_normalize, "eps": model.cell_eps}
    # A Mamba-2 block runs its recurrence as an mLSTM with a sigmoid gate and without normaliser.
    mamba = {"gate": "sigmoid", "normalize": False}
    cells = {
        "M": (sizes.qk // heads, sizes.v // heads, model.gate_soft_cap, classic),
        "m": (sizes.up // heads, sizes.up // heads, None, classic),
        "d": (model.ssm_state_dim, model.ssm_head_dim, None, mamba),
    }
    for letter in sorted(letters & set(cells)):
        qk, v, cap, options = cells[letter]
        problems += check_mlstm(
            qk_dim=qk,
            v_dim=v,
            heads=HEADS,
            chunk_size=model.chunk_size,
            gate_soft_cap=cap,
            states_dtype=states_dtype,
            **options,
            **where,
        )
    scan = {"head_dim": model.hidden_size // heads, "heads": HEADS}
    if "s" in letters:
        gates = {"forget_gate": model.slstm_forget_gate, "input_gate": model.slstm_input_gate}
        problems += check_slstm(**scan, **gates, **where)
        if slstm_form == "persistent":
            problems += check_slstm(**scan, **gates, **(where | {"backend": "persistent"}))
    if "l" in letters:
        problems += check_lstm(**scan, **where)
    convolved = {
        "m": (sizes.up, model.conv_width),
        "s": (model.hidden_size, sizes.slstm_conv),
        "l": (model.hidden_size, sizes.slstm_conv),
        "d": (sizes.mamba + 2 * model.ssm_state_dim, model.conv_width),
    }
    for channels, width in sorted({convolved[letter] for letter in letters & set(convolved)}):
        if width:
            problems += check_conv(channels=channels, width=width, **large)
    if "m" in letters:
        blocks = {"heads": heads, "block": model.qkv_block_size}
        problems += check_qkv_and_gates(inner=sizes.up, **blocks, **large)
        if model.head_norm != "none":
            head = {"heads": heads, "width": sizes.up // heads, "eps": model.norm_eps}
            problems += check_norm_gated_skip(kind=model.head_norm, **head, **large)
    if letters & set("M*"):
        problems += check_gated_activation(width=sizes.ffn, activation="silu", **large)
    if letters & set("sl") and sizes.slstm_ffn:
        problems += check_gated_activation(width=sizes.slstm_ffn, activation="gelu", **large)
    norm = {"eps": model.norm_eps, **large}
    problems += check_norm(width=model.hidden_size, kind=model.norm, **norm)
    if letters & set("Ms*l") and model.residual:  # between a mixer and its feed-forward part
        problems += check_norm(width=model.hidden_size, kind=model.norm, summed=True, **norm)
    widths = {"M": sizes.v, "s": model.hidden_size, "l": model.hidden_size}
    head_norms = {(widths[letter] // heads, letter == "M") for letter in letters & set(widths)}
    if model.head_norm != "none":
        for width, gated in sorted(head_norms):
            problems += check_norm(
                width=width, heads=heads, gated=gated, kind=model.head_norm, **norm
            )
    problems += check_loss(width=model.vocab_size, soft_cap=model.logit_soft_cap, **large)
    return problems
