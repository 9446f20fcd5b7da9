"""transformers' `llama`: models of `*` blocks alone, the papers' Transformer baseline.

Both turn channel pairs `(i, i + d/2)` by the rotary angles, so converting is renaming.
"""

from collections.abc import Mapping
from typing import Any

from xlstm_io.terminal import shortened
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.imports.config import ForeignConfig, count_layers, shape_of, width_keys
from xlstm_mcore.convert.tables import Shape, Table, renames
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.dimensions import attention_heads, dimensions

NAME = "llama"

TABLE = Table(
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    prefix="model.layers.{n}.",
    layers={
        "*": renames(
            {
                "mixer_norm.weight": "input_layernorm.weight",
                "mixer.q_proj.weight": "self_attn.q_proj.weight",
                "mixer.k_proj.weight": "self_attn.k_proj.weight",
                "mixer.v_proj.weight": "self_attn.v_proj.weight",
                "mixer.out_proj.weight": "self_attn.o_proj.weight",
                "ffn_norm.weight": "post_attention_layernorm.weight",
                "ffn.gate_proj.weight": "mlp.gate_proj.weight",
                "ffn.up_proj.weight": "mlp.up_proj.weight",
                "ffn.down_proj.weight": "mlp.down_proj.weight",
            }
        )
    },
)

NOTES: tuple[str, ...] = ()


def unsupported_reason(model: ModelConfig) -> str | None:
    """Why the class cannot compute a model exactly, as a sentence without its full stop."""
    if set(model.pattern.replace("|", "")) != {"*"}:
        return f"llama has only * blocks, and model.pattern is {model.pattern}"
    if model.norm != "rmsnorm":
        return "llama always has model.norm=rmsnorm"
    if model.logit_soft_cap is not None:
        return "llama has no cap on the logits (model.logit_soft_cap=null)"
    if not model.residual:
        return "llama always has a sum around each part of a block (model.residual=true)"
    if model.attention_window is not None:
        return "llama has no window of attention (model.attention_window=null)"
    if model.dropout:
        return "llama has no dropout of block outputs"
    if model.vocab_tokens is not None:
        return (
            f"llama gives a logit to all {model.vocab_size} rows of the vocabulary, "
            f"and training gave one to the first {model.vocab_tokens} alone (leave --keep-padding "
            "out)"
        )
    return None


def config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that describe the model."""
    heads, kv_heads = attention_heads(model)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": NAME,
        "hidden_size": model.hidden_size,
        "intermediate_size": dimensions(model).ffn,
        "num_hidden_layers": len(model.pattern.replace("|", "")),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": model.hidden_size // heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": True,
    }


def table(shapes: Mapping[str, Shape]) -> Table:
    """The table, whatever tensors there are."""
    return TABLE


def model_section(config: ForeignConfig, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The `model:` section of a folder.

    Raises:
        ConvertError: a key or a tensor says what a `*` block cannot compute.
    """
    config.must_be("hidden_act", "silu")
    config.must_be("attention_bias", False)
    config.must_be("mlp_bias", False)
    # Transformers' class heeds it with a cache alone, other programs always.
    config.must_be("sliding_window", None)
    vocab, hidden = shape_of(shapes, TABLE.embedding, 2)
    layers = count_layers(shapes, TABLE.prefix)
    heads = config.integer("num_attention_heads")
    if hidden % heads or config.integer("head_dim", default=hidden // heads) != hidden // heads:
        raise ConvertError(
            f"{config.source}: heads of another width than hidden_size / num_attention_heads = "
            f"{hidden / heads:g}, which a * block does not have"
        )
    return {
        "pattern": "*" * layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "attention_heads": heads,
        "attention_kv_heads": config.integer("num_key_value_heads", default=heads),
        "vocab_size": vocab,
        "tie_embeddings": TABLE.head not in shapes
        or config.values.get("tie_word_embeddings") is True,
        "norm_eps": config.number("rms_norm_eps", default=1e-6),
        "logit_soft_cap": None,
        "rotary_base": _rotary_base(config),
        **width_keys(
            hidden, ffn=shape_of(shapes, TABLE.prefix.format(n=0) + "mlp.down_proj.weight", 2)[1]
        ),
    }


def _rotary_base(config: ForeignConfig) -> float:
    """The base of rotary positions that are neither scaled nor partial.

    As in transformers, the older key `rope_scaling` goes first, and the kind may be called `type`.

    Raises:
        ConvertError: they are scaled or partial.
    """
    key = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    said = config.values.get(key) or {}
    plain = isinstance(said, Mapping) and said.get("factor", 1) == 1
    if not plain or said.get("rope_type", said.get("type", "default")) != "default":
        raise ConvertError(
            f"{config.source}: {key}={shortened(said)}; only plain rotary positions "
            '(rope_type="default") can be imported exactly'
        )
    rotary = ForeignConfig({**config.values, **said}, config.source)
    rotary.must_be("partial_rotary_factor", 1.0)
    return rotary.number("rope_theta", default=10_000.0)
