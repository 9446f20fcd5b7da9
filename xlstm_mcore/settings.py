"""The sections of a run file that describe the model: `model:`, `layout:` and `memory:`.

Each key is declared here and nowhere else: name, type, limits, default and help text. The
trainer's schema takes these sections as they are (`pretrain.config.schema`), and `XLSTMConfig`
holds them. A new key of the model is one entry in `ModelConfig`.

The docstring under a field is its help text (`--help`, docs/configuration.md) and part of its error
message. Rules that need two fields are in `pretrain.config.checks.fields`. Nothing here imports
torch.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from xlstm_mcore.pattern import parse_pattern, spelled_out

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
# The gradient has the inverse of its square, which fp32 must hold.
SoftCap = Annotated[float, Field(ge=1e-3)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
# Every cache has room for them.
Sinks = Annotated[int, Field(ge=0, le=1024)]


def _readable(pattern: str) -> str:
    """The pattern, letter by letter; raises PatternError where it cannot be read."""
    letters = spelled_out(pattern)
    parse_pattern(letters)
    return letters


class Section(BaseModel):
    """What all sections share: unknown keys, nan and inf are errors, and values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The model."""

    pattern: Annotated[str, AfterValidator(_readable)]
    """letter per layer: M or m mLSTM, s sLSTM, l LSTM, d Mamba-2, * attention; | cuts stages"""
    hidden_size: PositiveInt
    """width of the residual stream"""
    num_heads: PositiveInt
    """heads of every mLSTM and sLSTM block"""
    vocab_size: PositiveInt
    """rows of the embedding; at least the tokenizer's size"""
    vocab_tokens: PositiveInt | None = None
    """rows with a token; the rest is padding and gets no logit; null for the tokenizer's size"""
    tie_embeddings: bool = False
    """use the embedding as output layer too"""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """norm before each block: rmsnorm for M, layernorm for classic models"""
    norm_eps: PositiveFloat = 1e-6
    """added to the variance in every norm"""
    cell_eps: NonNegativeFloat = 1e-6
    """added to the denominator of the mLSTM cell"""
    qk_dim_factor: PositiveFloat = 0.5
    """M: width of q and k over hidden_size"""
    v_dim_factor: PositiveFloat = 1.0
    """M: width of v and the output gate over hidden_size"""
    ffn_dim_factor: PositiveFloat = 2.667
    """M and *: feed-forward width over hidden_size, rounded up to round_up_to"""
    gate_soft_cap: SoftCap | None = 15.0
    """M: cap a on the input and forget gate, a tanh(x / a); null for none"""
    logit_soft_cap: SoftCap | None = 30.0
    """cap on the logits; null for none (classic models)"""
    igate_bias_init: float = -10.0
    """M: initial bias of the input gate"""
    up_dim_factor: PositiveFloat = 2.0
    """m: inner width over hidden_size, rounded up to round_up_to"""
    qkv_block_size: PositiveInt = 4
    """m: size of the diagonal blocks of the q, k and v projections"""
    conv_width: NonNegativeInt = 4
    """m, s, l and d: taps of the causal convolution; 0 leaves it out, and its SiLU"""
    slstm_conv_width: NonNegativeInt | None = None
    """s and l: their own conv_width; null for conv_width"""
    slstm_ffn_dim_factor: NonNegativeFloat = 1.3
    """s and l: feed-forward width over hidden_size, rounded up to round_up_to; 0 for none"""
    head_norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    """M, m, s and l: norm of each head's output; none keeps only its weight"""
    mlstm_gate: Literal["exp", "sigmoid"] = "exp"
    """M and m: activation of the input gate"""
    mlstm_normalize: bool = True
    """M and m: divide by the normaliser state; false for the bare numerator"""
    mlstm_input_gate: bool = True
    """M and m: false holds the input gate at 1; its parameters stay, without effect"""
    mlstm_forget_gate: bool | Literal["bias"] = True
    """M and m: false holds the forget gate at 1, bias at a learned value; unused weights stay"""
    slstm_input_gate: Literal["exp", "sigmoid"] = "exp"
    """s: activation of the input gate"""
    slstm_forget_gate: Literal["sigmoid", "exp"] = "sigmoid"
    """s: activation of the forget gate"""
    slstm_recurrent_init: Literal["zeros", "normal"] = "zeros"
    """s and l: initial recurrent weights; normal has the deviation 1 / sqrt(width of a head)"""
    ssm_dim_factor: PositiveFloat = 2.0
    """d: inner width over hidden_size, rounded up to whole heads"""
    ssm_head_dim: PositiveInt = 64
    """d: width of a head"""
    ssm_state_dim: PositiveInt = 128
    """d: width of B and C, which all heads share"""
    attention_heads: PositiveInt | None = None
    """*: heads of attention; null for num_heads"""
    attention_kv_heads: PositiveInt | None = None
    """*: heads of k and v, each shared by several of q (grouped-query); null for attention_heads"""
    attention_window: PositiveInt | None = None
    """*: tokens of its document that a token sees, itself and the last ones; null for all"""
    attention_sinks: Sinks = 0
    """*: first tokens of a document that are seen from outside the window too"""
    rotary_base: PositiveFloat = 10_000.0
    """*: base of the rotary positions' wavelengths"""
    residual: bool = True
    """false leaves out the sum around each part of a block, for the plain LSTM of the ablation"""
    round_up_to: PositiveInt = 64
    """inner widths are rounded up to a multiple of this"""
    dropout: Fraction = 0.0
    """share of block outputs dropped in training"""
    chunk_size: PositiveInt | None = None
    """tokens the mLSTM kernel handles at a time; null lets the kernel choose"""
    kernel_backend: Literal["torch", "triton"] | None = None
    """backend of the cells and convolutions; null picks the best one for the device"""


class LayoutConfig(Section):
    """How the model is spread over processes; what is left over is data parallel."""

    tensor: PositiveInt = 1
    """tensor parallel size: heads and widths are split over this many processes"""
    sequence: bool = False
    """sequence parallel: norms and residuals split over the tensor parallel processes"""
    pipeline: PositiveInt = 1
    """pipeline parallel size; a pattern without | is cut so that stages have about the same work"""
    virtual: PositiveInt = 1
    """pipeline stages per process (interleaved schedule)"""
    context: PositiveInt = 1
    """context parallel size: the sequence is split over this many processes"""


class MemoryConfig(Section):
    """What is kept for the backward pass, and how. No result changes but for rounding."""

    recompute: Literal["none", "selective", "cells", "full"] = "none"
    """selective: norms, activations, gates, gathers, M's cells; cells: m's and d's; full: all"""
    recompute_full_blocks: str = ""
    """letters whose blocks are recomputed in full whatever memory.recompute says, such as s*"""
    logits_mib: NonNegativeInt = 512
    """MiB of logits on a process; larger ones are computed in parts, twice, and never kept whole"""
    cell_states: Literal["fp32", "bf16"] | None = None
    """what the mLSTM keeps states between chunks in; null: fp32, on a GPU as the model computes"""
    slstm_form: Literal["graphs", "persistent"] = "graphs"
    """s on a GPU: replayed graphs of steps, or (bf16) one launch with weights in shared memory"""
