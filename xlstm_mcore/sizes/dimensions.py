"""Widths and numbers of heads that follow from the `model:` section."""

import math
from dataclasses import dataclass

from xlstm_mcore.settings import ModelConfig


@dataclass(frozen=True)
class Dimensions:
    """Widths that follow from the hidden size and the factors.

    Attributes:
        qk: width of q, and of k, in an `M` block, over all heads.
        v: width of v and of the output gate in an `M` block, over all heads.
        ffn: feed-forward width of `M` and `*`.
        up: width inside an `m` block.
        slstm_ffn: feed-forward width of `s` and `l`.
        mamba: width inside a `d` block, a multiple of its heads' width.
        slstm_conv: taps of the convolution in `s` and `l`.
    """

    qk: int
    v: int
    ffn: int
    up: int
    slstm_ffn: int
    mamba: int
    slstm_conv: int


def round_up(value: float, multiple: int) -> int:
    """Smallest multiple of `multiple` that is not below `value`.

    The value is rounded to six digits first: a factor such as 1.1 times 3200 is
    3520.0000000000005 in floating point and would gain a whole step.
    """
    return multiple * math.ceil(round(value, 6) / multiple)


def dimensions(model: ModelConfig) -> Dimensions:
    """The derived widths of a model, rounded as the papers' counts need it."""
    hidden, multiple = model.hidden_size, model.round_up_to
    return Dimensions(
        qk=int(hidden * model.qk_dim_factor),
        v=int(hidden * model.v_dim_factor),
        ffn=round_up(hidden * model.ffn_dim_factor, multiple),
        up=round_up(hidden * model.up_dim_factor, multiple),
        slstm_ffn=round_up(hidden * model.slstm_ffn_dim_factor, multiple),
        mamba=round_up(hidden * model.ssm_dim_factor, model.ssm_head_dim),
        slstm_conv=model.conv_width if model.slstm_conv_width is None else model.slstm_conv_width,
    )


def attention_heads(model: ModelConfig) -> tuple[int, int]:
    """Heads of q, and of k and v, in a `*` block."""
    heads = model.attention_heads or model.num_heads
    return heads, model.attention_kv_heads or heads
