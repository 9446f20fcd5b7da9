"""XLSTMConfig: the architecture (the ``model:`` section of a run) over Megatron's settings."""

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from xlstm_mcore.pattern import parse_pattern
from xlstm_mcore.sizes.dimensions import dimensions


@dataclass
class XLSTMConfig(TransformerConfig):
    """An xLSTM language model as Megatron-core sees it.

    ``pattern`` spells every layer: ``M`` 7B-style mLSTM block (arXiv 2503.13427), ``m`` classic
    mLSTM block and ``s`` classic sLSTM block (arXiv 2405.04517), ``*`` causal attention block;
    ``|`` cuts pipeline stages.
    ``num_layers`` follows from it; ``num_attention_heads`` is ``num_heads``.
    """

    pattern: str = ""
    num_heads: int = 0
    vocab_size: int = 0
    tie_embeddings: bool = False

    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    cell_eps: float = 1e-6
    logit_soft_cap: float | None = 30.0
    dropout: float = 0.0

    # 7B-style mLSTM block
    qk_dim_factor: float = 0.5
    v_dim_factor: float = 1.0
    ffn_dim_factor: float = 2.667
    gate_soft_cap: float | None = 15.0
    igate_bias_init: float = -10.0

    # classic blocks
    up_dim_factor: float = 2.0
    qkv_block_size: int = 4
    conv_width: int = 4
    slstm_ffn_dim_factor: float = 1.3
    round_up_to: int = 64

    # ablations (arXiv 2405.04517, appendix D; arXiv 2503.14376 for the sigmoid gate)
    head_norm: str = "layernorm"
    mlstm_gate: str = "exp"
    mlstm_normalize: bool = True
    mlstm_input_gate: bool = True
    mlstm_forget_gate: bool = True
    slstm_forget_gate: str = "sigmoid"

    # attention block
    attention_heads: int | None = None
    attention_kv_heads: int | None = None
    rope_base: float = 10_000.0

    # memory (see recompute.py)
    recompute: str = "none"
    recompute_full_blocks: str = ""
    logits_mib: int = 512  # see loss.py

    # kernels
    chunk_size: int | None = None
    kernel_backend: str | None = None

    def __post_init__(self) -> None:
        """Derive Megatron's own fields from the pattern and the heads."""
        self.num_layers = len(self.layer_letters)
        self.num_attention_heads = self.num_heads
        self.hidden_dropout = self.dropout
        super().__post_init__()

    @property
    def layer_letters(self) -> list[str]:
        """One letter per layer, over all pipeline stages."""
        return list(parse_pattern(self.pattern).letters)

    @property
    def qk_dim(self) -> int:
        """Width of q and k over all heads (7B-style block)."""
        return dimensions(self).qk

    @property
    def v_dim(self) -> int:
        """Width of v and of the output gate over all heads (7B-style block)."""
        return dimensions(self).v

    @property
    def ffn_dim(self) -> int:
        """Inner width of the 7B-style block's SwiGLU."""
        return dimensions(self).ffn

    @property
    def up_dim(self) -> int:
        """Inner width of the classic mLSTM block (its pre up-projection)."""
        return dimensions(self).up

    @property
    def slstm_ffn_dim(self) -> int:
        """Inner width of the classic sLSTM block's GeGLU."""
        return dimensions(self).slstm_ffn
