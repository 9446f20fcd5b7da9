"""Floating point operations of a model, by arithmetic, and the share of a device that they use.

What is counted is the model's own work: a matrix product of `[m, k]` and `[k, n]` is 2 m k n, and
the cells count their recurrences (arXiv 2405.04517, equations 8 to 27), not what a kernel happens
to execute for them. A chunkwise kernel does more (`chunkwise_cell_flops`), and so does a run that
recomputes activations; counting that as useful work would make a slower setting look better.
Elementwise work is left out, as is usual. Backward is twice forward: one product for the gradient
of each factor.

Counting needs only the `model:` section and no torch.
"""

from xlstm_mcore.pattern import parse_pattern
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.dimensions import attention_heads, dimensions

COMPONENTS = ("projections", "feed_forward", "conv", "cell", "head")

# Dense bf16 TFLOP/s of the makers' data sheets (no sparsity). The first name that the device's
# name contains counts, so the narrower ones come first.
PEAK_BF16_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("MI300X", 1307.4),
)


def block_flops(letter: str, model: ModelConfig, seq_len: int | None) -> dict[str, int]:
    """Forward FLOPs of one token in one block, by component (all of COMPONENTS but the head).

    Attention depends on the length of the row: a token sees (seq_len + 1) / 2 on average, itself
    included, or less with a window. Boundaries inside the row, which make it less, are left out.
    """
    dims = dimensions(model)
    hidden, heads = model.hidden_size, model.num_heads
    if letter == "M":
        return {
            "projections": 2 * hidden * (2 * dims.qk + 3 * dims.v + 2 * heads),
            "feed_forward": 6 * hidden * dims.ffn,
            "conv": 0,
            "cell": heads * mlstm_cell_flops(dims.qk // heads, dims.v // heads),
        }
    if letter == "m":
        return {
            # up, z and out; block-diagonal q, k and v; two gates that see all of them
            "projections": 6 * hidden * dims.up
            + 6 * dims.up * model.qkv_block_size
            + 2 * 2 * heads * 3 * dims.up,
            "feed_forward": 0,
            "conv": 2 * model.conv_width * dims.up,
            "cell": heads * mlstm_cell_flops(dims.up // heads, dims.up // heads),
        }
    if letter in ("s", "l"):
        return {
            "projections": 2 * 4 * hidden * (hidden // heads),
            "feed_forward": 6 * hidden * dims.slstm_ffn,
            "conv": 2 * dims.slstm_conv * hidden,
            "cell": 2 * 4 * hidden * (hidden // heads),  # h_{t-1} times four recurrent matrices
        }
    if letter == "d":
        inner, state = dims.mamba, model.ssm_state_dim
        return {
            "projections": 2 * hidden * (3 * inner + 2 * state + inner // model.ssm_head_dim),
            "feed_forward": 0,
            "conv": 2 * model.conv_width * (inner + 2 * state),
            "cell": 4 * inner * state,  # write B x^T, read C
        }
    if letter == "*":
        if seq_len is None:
            raise ValueError("the FLOPs of attention (*) depend on the row's length: pass seq_len")
        q_heads, kv_heads = attention_heads(model)
        return {
            "projections": 4 * hidden * (hidden + hidden // q_heads * kv_heads),
            "feed_forward": 6 * hidden * dims.ffn,
            "conv": 0,
            # q k^T, and the scores times v
            "cell": 4 * hidden * attended_pairs(model, seq_len) // seq_len,
        }
    raise AssertionError(f"no block has the letter {letter!r}")


def attended_pairs(model: ModelConfig, seq_len: int) -> int:
    """Pairs of tokens of a row in which one sees the other in attention, or itself."""

    def pairs(tokens: int, most: int) -> int:
        short = min(tokens, most)
        return short * (short + 1) // 2 + (tokens - short) * most

    window = model.attention_window or seq_len
    beyond = max(0, seq_len - window)  # tokens with others before their window: some are sinks
    return pairs(seq_len, window) + pairs(beyond, model.attention_sinks)


def mlstm_cell_flops(qk_head_dim: int, v_head_dim: int) -> int:
    """Forward FLOPs of one token in one mLSTM head: write k v^T and k, read C^T q and n . q."""
    return 4 * qk_head_dim * (v_head_dim + 1)


def chunkwise_cell_flops(qk_head_dim: int, v_head_dim: int, chunk: int) -> int:
    """Forward FLOPs per token and head that a chunkwise mLSTM executes with full score blocks.

    State in and out of the chunk (as the recurrence, once per token) and the scores q k^T and
    their product with v and 1 over the whole chunk (arXiv 2503.14376, section 3).
    """
    inside = 2 * chunk * (qk_head_dim + v_head_dim + 1)
    return mlstm_cell_flops(qk_head_dim, v_head_dim) + inside


def forward_flops(model: ModelConfig, seq_len: int | None = None) -> dict[str, int]:
    """Forward FLOPs of one token by component; `head` is the product with the vocabulary.

    Args:
        model: the `model:` section.
        seq_len: tokens per row; needed for patterns with attention only.

    Raises:
        ValueError: the pattern has attention and `seq_len` is None.
    """
    total = dict.fromkeys(COMPONENTS, 0)
    total["head"] = 2 * model.hidden_size * model.vocab_size
    for letter in parse_pattern(model.pattern).letters:
        for component, count in block_flops(letter, model, seq_len).items():
            total[component] += count
    return total


def training_flops(model: ModelConfig, seq_len: int | None = None) -> int:
    """FLOPs of one token, forward and backward, without recomputation (see `forward_flops`)."""
    return 3 * sum(forward_flops(model, seq_len).values())


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device by its name, or None where it is not in the table."""
    for name, peak in PEAK_BF16_TFLOPS:
        if name in device_name:
            return peak
    return None


def state_bytes(model: ModelConfig, activation_bytes: int, tokens: int = 0) -> int:
    """Bytes of one sequence's state in generation after `tokens` tokens.

    It is the same after any number of them but for attention, which keeps k and v of each, or at
    most those of two windows and the sinks. Cell states are fp32 (C, n, m of mLSTM and Mamba-2;
    h, c, n, m of sLSTM; h, c of LSTM). The convolutions keep their last inputs, and attention k
    and v, in the activations' type of `activation_bytes` bytes.
    """
    dims, heads = dimensions(model), model.num_heads
    taps, slstm_taps = (
        max(width - 1, 0) * activation_bytes for width in (model.conv_width, dims.slstm_conv)
    )
    state = model.ssm_state_dim
    each = {
        "M": 4 * (dims.qk * (dims.v // heads) + dims.qk + heads),
        "m": 4 * (dims.up * (dims.up // heads) + dims.up + heads) + taps * dims.up,
        "s": 4 * 4 * model.hidden_size + slstm_taps * model.hidden_size,
        "l": 4 * 2 * model.hidden_size + slstm_taps * model.hidden_size,
        "d": 4 * (dims.mamba * state + (state + 1) * (dims.mamba // model.ssm_head_dim))
        + taps * (dims.mamba + 2 * state),
    }
    letters = parse_pattern(model.pattern).letters
    if "*" in letters:
        q_heads, kv_heads = attention_heads(model)
        key = model.hidden_size // q_heads * kv_heads * activation_bytes
        if model.attention_window is not None:
            tokens = min(tokens, 2 * model.attention_window) + model.attention_sinks
        each["*"] = 2 * key * tokens + 8  # and where the current document begins
    return sum(each[letter] for letter in letters)
