"""The number of parameters of a model, counted without building it."""

from typing import Any

from xlstm_mcore.pattern import parse_pattern
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.dimensions import attention_heads, dimensions


def block_parameters(letter: str, model: ModelConfig) -> int:
    """Parameters of one block, norms included; the names are those of the checkpoint files."""
    dims = dimensions(model)
    hidden, heads = model.hidden_size, model.num_heads
    if letter == "M":
        mixer = (
            2 * dims.qk * hidden  # q_proj, k_proj
            + 2 * dims.v * hidden  # v_proj, ogate
            + 2 * heads * (hidden + 1)  # igate, fgate
            + dims.v  # head_norm
            + hidden * dims.v  # out_proj
        )
        ffn = hidden + 3 * dims.ffn * hidden  # ffn_norm; gate_proj, up_proj, down_proj
    elif letter == "m":
        mixer = (
            2 * dims.up * hidden  # up_proj, z_proj
            + (dims.up * (model.conv_width + 1) if model.conv_width else 0)  # conv
            + 3 * dims.up * model.qkv_block_size  # q_proj, k_proj, v_proj (block diagonal)
            + 2 * heads * (3 * dims.up + 1)  # igate, fgate see q, k and v of all heads
            + 2 * dims.up  # head_norm, learnable_skip
            + hidden * dims.up  # out_proj
        )
        ffn = 0
    elif letter in ("s", "l"):
        head_dim = hidden // heads
        mixer = (
            (hidden * (dims.slstm_conv + 1) if dims.slstm_conv else 0)  # conv
            + 2 * 4 * heads * head_dim * head_dim  # four gate projections, recurrent_weight
            + 4 * hidden  # bias
            + hidden  # head_norm
        )
        ffn = hidden + 3 * dims.slstm_ffn * hidden if dims.slstm_ffn else 0
    elif letter == "d":
        inner, state = dims.mamba, model.ssm_state_dim
        mamba_heads, convolved = inner // model.ssm_head_dim, inner + 2 * state
        mixer = (
            hidden * (inner + convolved + mamba_heads)  # z_proj; x_proj, b_proj, c_proj; dt_proj
            + (convolved * (model.conv_width + 1) if model.conv_width else 0)  # x, b, c
            + 3 * mamba_heads  # a_log, dt_bias, skip
            + inner  # gated_norm
            + hidden * inner  # out_proj
        )
        ffn = 0
    elif letter == "*":
        q_heads, kv_heads = attention_heads(model)
        head_dim = hidden // q_heads
        mixer = 2 * hidden * hidden + 2 * kv_heads * head_dim * hidden  # q, out; k, v
        ffn = hidden + 3 * dims.ffn * hidden
    else:
        raise AssertionError(f"no block has the letter {letter!r}")
    return hidden + mixer + ffn  # mixer_norm comes first


def count_parameters(model: ModelConfig) -> dict[str, Any]:
    """Count the parameters of a model, exactly, as `embedding`, `layers`, `final_norm`, `head`.

    Returns:
        A dict: `embedding`, `final_norm`, `head` (0 when tied), `layers` (a list, one number per
        layer), `blocks` (their sum) and `total`.
    """
    layers = [block_parameters(letter, model) for letter in parse_pattern(model.pattern).letters]
    table = model.vocab_size * model.hidden_size
    counts: dict[str, Any] = {
        "embedding": table,
        "layers": layers,
        "blocks": sum(layers),
        "final_norm": model.hidden_size,
        "head": 0 if model.tie_embeddings else table,
    }
    counts["total"] = sum(counts[part] for part in ("embedding", "blocks", "final_norm", "head"))
    return counts
