"""This project's own class, `xlstm_blocks`: the papers' blocks with every key of theirs.

The one block that it does not have is Mamba-2, a baseline of the papers' experiments.

The class is one file, `xlstm_mcore/hf/modeling_xlstm_blocks.py`. It travels with the weights, and
`import xlstm_mcore.hf` registers it where this package is installed. Its names are ours after the
prefix, so converting is renaming.
"""

from collections.abc import Mapping
from typing import Any

from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.imports.config import ForeignConfig, shape_of, width_keys
from xlstm_mcore.convert.tables import LAYER_TENSORS, Shape, Table, renames
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.dimensions import attention_heads, dimensions

NAME = "xlstm_blocks"

TABLE = Table(
    embedding="model.embeddings.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    prefix="model.layers.{n}.",
    layers={
        letter: renames({name: name for name in tensors})
        for letter, tensors in LAYER_TENSORS.items()
    },
)

NOTES: tuple[str, ...] = ()

#: Keys of the model that config.json has under the same name and with the same meaning.
SAME_KEYS = (
    "hidden_size",
    "num_heads",
    "norm",
    "norm_eps",
    "cell_eps",
    "gate_soft_cap",
    "logit_soft_cap",
    "qkv_block_size",
    "conv_width",
    "head_norm",
    "mlstm_gate",
    "mlstm_normalize",
    "mlstm_input_gate",
    "mlstm_forget_gate",
    "slstm_forget_gate",
    "rotary_base",
    "dropout",
)

#: The same, but older folders do not have them.
LATER_KEYS: dict[str, Any] = {
    "vocab_tokens": None,
    "slstm_conv_width": None,
    "slstm_input_gate": "exp",
    "attention_window": None,
    "attention_sinks": 0,
    "residual": True,
}


def unsupported_reason(model: ModelConfig) -> str | None:
    """Why the class cannot compute a model, as a sentence without its full stop."""
    unknown = sorted(set(model.pattern) - set(TABLE.layers) - {"|"})
    if unknown:
        return f"the {NAME} class has no {unknown[0]} block, which model.pattern names"
    return None


def config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that describe the model; widths stand there as they are."""
    widths, (heads, kv_heads) = dimensions(model), attention_heads(model)
    return {
        "architectures": ["XLSTMBlocksForCausalLM"],
        "model_type": NAME,
        "auto_map": {
            "AutoConfig": "configuration_xlstm_blocks.XLSTMBlocksConfig",
            "AutoModel": "modeling_xlstm_blocks.XLSTMBlocksModel",
            "AutoModelForCausalLM": "modeling_xlstm_blocks.XLSTMBlocksForCausalLM",
        },
        "pattern": model.pattern.replace("|", ""),
        **{key: getattr(model, key) for key in (*SAME_KEYS, *LATER_KEYS)},
        "qk_dim": widths.qk,
        "v_dim": widths.v,
        "ffn_dim": widths.ffn,
        "up_dim": widths.up,
        "slstm_ffn_dim": widths.slstm_ffn,
        "attention_heads": heads,
        "attention_kv_heads": kv_heads,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }


def table(shapes: Mapping[str, Shape]) -> Table:
    """The table, whatever tensors there are."""
    return TABLE


def model_section(config: ForeignConfig, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The `model:` section of a folder; `ModelConfig` checks the values of keys of the same name.

    Raises:
        ConvertError: a key is missing.
    """
    missing = [key for key in ("pattern", *SAME_KEYS) if key not in config.values]
    if missing:
        raise ConvertError(f"{config.source} has no {', '.join(missing)}")
    unknown = set(str(config.values["pattern"])) - set(TABLE.layers) - {"|"}
    if unknown:
        raise ConvertError(
            f"{config.source}: pattern has {min(unknown)!r}; the {NAME} class has the blocks "
            f"{', '.join(TABLE.layers)}"
        )
    vocab, hidden = shape_of(shapes, TABLE.embedding, 2)
    widths = {name: config.integer(f"{name}_dim") for name in ("ffn", "up", "qk", "v")}
    without = config.values.get("slstm_ffn_dim") == 0  # blocks without a feed-forward part
    widths["slstm_ffn"] = 0 if without else config.integer("slstm_ffn_dim")
    heads = ("attention_heads", "attention_kv_heads") if "*" in config.values["pattern"] else ()
    return {
        "pattern": config.values["pattern"],
        "vocab_size": vocab,
        "tie_embeddings": TABLE.head not in shapes,
        **{key: config.values[key] for key in SAME_KEYS},
        **{key: config.values.get(key, default) for key, default in LATER_KEYS.items()},
        **{key: config.integer(key) for key in heads},
        **width_keys(hidden, **widths),
    }
