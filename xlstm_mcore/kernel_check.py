"""Do the kernels of a model compute what they should on this device?"""

from typing import Any, NamedTuple

import torch

from xlstm_kernels.self_check import check_lstm, check_mlstm, check_slstm
from xlstm_kernels.self_check_layers import (
    check_conv,
    check_gated_activation,
    check_loss,
    check_norm,
    check_norm_gated_skip,
    check_qkv_and_gates,
)
from xlstm_mcore.modules.loss import logit_widths
from xlstm_mcore.pattern import parse_pattern
from xlstm_mcore.settings import LayoutConfig, MemoryConfig, ModelConfig
from xlstm_mcore.sizes.dimensions import Dimensions, dimensions

STATES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}


class Share(NamedTuple):
    """What a rank computes at a time. Triton compiles kernels for it, so the check tries that.

    Attributes:
        rows: of a micro-batch.
        steps: tokens of a row, those of all context-parallel ranks.
        layout: over how many ranks rows, heads and columns are spread.
        memory: what the cells keep, the form of the sLSTM, and how many logits are held.
    """

    rows: int
    steps: int
    layout: LayoutConfig
    memory: MemoryConfig

    @property
    def tokens(self) -> int:
        """Tokens of a call that has a part of the columns."""
        return self.rows * self.steps // self.layout.context


def compare_kernels(
    model: ModelConfig, share: Share, device: torch.device | str, dtype: torch.dtype
) -> list[str]:
    """Compare a model's kernels with their fp64 references; see `xlstm_kernels.self_check`.

    Args:
        model: whose widths, gates, chunk size and backend are tried.
        share: what a rank computes at a time.
        device: where the kernels run.
        dtype: what the model computes in.

    Returns:
        One sentence for each tensor that differs; empty when all agree.
    """
    letters = set(parse_pattern(model.pattern).letters)
    sizes = dimensions(model)
    where = {"device": device, "dtype": dtype, "backend": model.kernel_backend}
    checks = _cells, _around_cells, _norms_and_loss
    return [one for check in checks for one in check(model, sizes, letters, share, where)]


def _cells(
    model: ModelConfig, sizes: Dimensions, letters: set[str], share: Share, where: dict[str, Any]
) -> list[str]:
    """What is wrong with the cells."""
    heads, problems = model.num_heads, []
    tensor, context = share.layout.tensor, share.layout.context
    classic = {"gate": model.mlstm_gate, "normalize": model.mlstm_normalize, "eps": model.cell_eps}
    # A Mamba-2 block runs its recurrence as an mLSTM with a sigmoid gate and without normaliser.
    mamba = {"gate": "sigmoid", "normalize": False}
    # The layer itself caps gates that other ranks need, or that an ablation removes.
    capped = model.mlstm_input_gate and model.mlstm_forget_gate and context == 1
    cap = model.gate_soft_cap if capped else None
    # qk_dim, v_dim, heads, cap, how gates lie in memory (see `check_mlstm`), options
    cells = {
        "M": (sizes.qk // heads, sizes.v // heads, heads, cap, "sbgh", classic),
        "m": (sizes.up // heads, sizes.up // heads, heads, None, "bshg", classic),
        "d": (
            model.ssm_state_dim,
            model.ssm_head_dim,
            sizes.mamba // model.ssm_head_dim,
            None,
            "gbhs",
            mamba,
        ),
    }
    for letter in sorted(letters & set(cells)):
        qk, v, count, cap, order, options = cells[letter]
        problems += check_mlstm(
            qk_dim=qk,
            v_dim=v,
            rows=share.rows,
            heads=count // tensor,
            length=share.steps // context,
            order=order,
            carried=context > 1,
            chunk_size=model.chunk_size,
            gate_soft_cap=cap,
            states_dtype=STATES[share.memory.cell_states],
            **options,
            **where,
        )
    width = model.hidden_size // heads
    if "s" in letters:
        scan = {"rows": share.rows, "heads": heads // (tensor * context)}
        gates = {"forget_gate": model.slstm_forget_gate, "input_gate": model.slstm_input_gate}
        problems += check_slstm(head_dim=width, **scan, **gates, **where)
        if share.memory.slstm_form == "persistent":
            form = where | {"backend": "persistent"}
            problems += check_slstm(head_dim=width, **scan, **gates, **form)
    if "l" in letters:
        problems += check_lstm(head_dim=width, **where)
    return problems


def _around_cells(
    model: ModelConfig, sizes: Dimensions, letters: set[str], share: Share, where: dict[str, Any]
) -> list[str]:
    """What is wrong with convolutions, block-diagonal maps, skips and activations."""
    problems: list[str] = []
    tensor, context = share.layout.tensor, share.layout.context
    large = {"tokens": share.tokens, **where}
    by_head = model.hidden_size // context, sizes.slstm_conv, False
    convolved = {
        "m": (sizes.up, model.conv_width, context > 1),
        "s": by_head,
        "l": by_head,
        "d": (sizes.mamba + 2 * model.ssm_state_dim, model.conv_width, context > 1),
    }
    for channels, width, carried in sorted({convolved[one] for one in letters & set(convolved)}):
        if width:
            channels //= tensor
            problems += check_conv(channels=channels, width=width, carried=carried, **large)
    heads, inner = model.num_heads // tensor, sizes.up // tensor
    if "m" in letters:
        blocks = {"block": model.qkv_block_size, "gates": 2 * model.num_heads}
        conv = {"width": model.conv_width, "carried": context > 1}
        problems += check_qkv_and_gates(inner=inner, heads=heads, **blocks, **conv, **large)
        if model.head_norm != "none":
            head = {"heads": heads, "width": inner // heads, "eps": model.norm_eps}
            problems += check_norm_gated_skip(kind=model.head_norm, **head, **large)
    if letters & set("M*"):
        width = sizes.ffn // tensor
        problems += check_gated_activation(width=width, activation="silu", **large)
    if letters & set("sl") and sizes.slstm_ffn:
        width = sizes.slstm_ffn // tensor
        problems += check_gated_activation(width=width, activation="gelu", **large)
    return problems


def _norms_and_loss(
    model: ModelConfig, sizes: Dimensions, letters: set[str], share: Share, where: dict[str, Any]
) -> list[str]:
    """What is wrong with the norms of blocks and of heads, and with the loss."""
    tensor, context = share.layout.tensor, share.layout.context
    large = {"tokens": share.tokens, **where}
    norm = {"eps": model.norm_eps, **large}
    own = share.tokens // (tensor if share.layout.sequence else 1)
    block = norm | {"width": model.hidden_size, "kind": model.norm, "tokens": own}
    problems = check_norm(**block)
    if model.residual:  # before a mixer; the kernel of its gradient adds that of the stream
        problems += check_norm(beside=True, **block)
    if letters & set("Ms*l") and model.residual:  # between a mixer and its feed-forward part
        problems += check_norm(summed=True, **block)
    widths = {"M": sizes.v, "s": model.hidden_size, "l": model.hidden_size}
    head_norms = {(widths[one] // model.num_heads, one == "M") for one in letters & set(widths)}
    if model.head_norm != "none":
        for width, gated in sorted(head_norms):
            heads = model.num_heads // tensor // (1 if gated else context)
            problems += check_norm(
                width=width, heads=heads, gated=gated, kind=model.head_norm, **norm
            )
    columns = model.vocab_size // tensor
    real = min(columns, model.vocab_tokens or columns)
    size = where["dtype"].itemsize
    for width in logit_widths(share.tokens, columns, real, size, share.memory.logits_mib):
        problems += check_loss(width=width, soft_cap=model.logit_soft_cap, **large)
    return problems
