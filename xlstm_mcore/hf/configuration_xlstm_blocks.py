"""Configuration of an xLSTM language model whose blocks are spelled by a pattern of letters."""

from transformers import PreTrainedConfig


class XLSTMBlocksConfig(PreTrainedConfig):
    """Configuration of `XLSTMBlocksModel` and `XLSTMBlocksForCausalLM`.

    Widths stand here as they are, after all rounding. The letters of `pattern` are `M` (the mLSTM
    block of xLSTM 7B, arXiv 2503.13427), `m` and `s` (the mLSTM and sLSTM blocks of the xLSTM
    paper, arXiv 2405.04517), `l` (the sLSTM block around the LSTM's cell) and `*` (causal attention
    with rotary positions).

    Attributes:
        pattern: One letter per layer.
        vocab_size: Rows of the embedding.
        vocab_tokens: Rows with a token; those behind them get no logit. None for all.
        hidden_size: Width of the residual stream.
        num_heads: Heads of every mLSTM and sLSTM.
        norm: Norm before each block, "rmsnorm" or "layernorm".
        norm_eps: Added to the variance in every norm.
        cell_eps: Added to the denominator of the mLSTM.
        qk_dim: `M`: width of q and k over all heads.
        v_dim: `M`: width of v and of the output gate over all heads.
        ffn_dim: `M` and `*`: width of the feed-forward part.
        gate_soft_cap: `M`: cap `a` of the gates, `a tanh(x / a)`; None for none.
        logit_soft_cap: Cap of the logits; None for none.
        up_dim: `m`: inner width.
        qkv_block_size: `m`: size of the diagonal blocks of the q, k and v projections.
        conv_width: `m`, `s` and `l`: taps of the causal convolution; 0 leaves it out, with its
            SiLU.
        slstm_conv_width: `s` and `l`: their own `conv_width`; None for `conv_width`.
        slstm_ffn_dim: `s` and `l`: width of the feed-forward part; 0 for none.
        head_norm: Norm of each head's output, "layernorm", "rmsnorm" or "none".
        mlstm_gate: Activation of the mLSTM's input gate, "exp" or "sigmoid".
        mlstm_normalize: Whether the mLSTM divides by its normaliser state.
        mlstm_input_gate: False holds the input gate at 1.
        mlstm_forget_gate: False holds the forget gate at 1, "bias" at a value that is learned.
        slstm_input_gate: Activation of the sLSTM's input gate, "exp" or "sigmoid".
        slstm_forget_gate: Activation of the sLSTM's forget gate, "sigmoid" or "exp".
        attention_heads: `*`: heads of q.
        attention_kv_heads: `*`: heads of k and v.
        attention_window: `*`: tokens that a token sees, itself included; None for all.
        attention_sinks: `*`: first tokens that are seen from outside the window too.
        rotary_base: `*`: base of the rotary positions' wavelengths.
        residual: False leaves out the sum around each part of a block.
        dropout: Share of block outputs dropped in training.
        use_cache: Whether a forward pass in evaluation mode returns the state for the next one.
    """

    model_type = "xlstm_blocks"
    keys_to_ignore_at_inference = ("past_key_values",)

    pattern: str = "M"
    vocab_size: int = 50304
    vocab_tokens: int | None = None
    hidden_size: int = 1024
    num_heads: int = 4
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    cell_eps: float = 1e-6
    qk_dim: int = 512
    v_dim: int = 1024
    ffn_dim: int = 2752
    gate_soft_cap: float | None = 15.0
    logit_soft_cap: float | None = 30.0
    up_dim: int = 2048
    qkv_block_size: int = 4
    conv_width: int = 4
    slstm_conv_width: int | None = None
    slstm_ffn_dim: int = 1344
    head_norm: str = "layernorm"
    mlstm_gate: str = "exp"
    mlstm_normalize: bool = True
    mlstm_input_gate: bool = True
    mlstm_forget_gate: bool | str = True
    slstm_input_gate: str = "exp"
    slstm_forget_gate: str = "sigmoid"
    attention_heads: int = 4
    attention_kv_heads: int = 4
    attention_window: int | None = None
    attention_sinks: int = 0
    rotary_base: float = 10_000.0
    residual: bool = True
    dropout: float = 0.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers, one per letter."""
        return len(self.pattern)
