"""transformers' own `xlstm`: models of `M` blocks alone, as xLSTM 7B is published.

Both sides store weights as (out, in) with each projection on its own, and norm weights are plain,
so converting is renaming. What the class cannot compute is listed in `unsupported_reason`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.imports.config import ForeignConfig, count_layers, shape_of, width_keys
from xlstm_mcore.convert.tables import STACK, Entry, Shape, Table, renames
from xlstm_mcore.settings import ModelConfig
from xlstm_mcore.sizes.dimensions import dimensions

NAME = "xlstm"

TABLE = Table(
    embedding="backbone.embeddings.weight",
    final_norm="backbone.out_norm.weight",
    head="lm_head.weight",
    prefix="backbone.blocks.{n}.",
    layers={
        "M": renames(
            {
                "mixer_norm.weight": "norm_mlstm.weight",
                "mixer.q_proj.weight": "mlstm_layer.q.weight",
                "mixer.k_proj.weight": "mlstm_layer.k.weight",
                "mixer.v_proj.weight": "mlstm_layer.v.weight",
                "mixer.ogate.weight": "mlstm_layer.ogate_preact.weight",
                "mixer.igate.weight": "mlstm_layer.igate_preact.weight",
                "mixer.igate.bias": "mlstm_layer.igate_preact.bias",
                "mixer.fgate.weight": "mlstm_layer.fgate_preact.weight",
                "mixer.fgate.bias": "mlstm_layer.fgate_preact.bias",
                "mixer.head_norm.weight": "mlstm_layer.multihead_norm.weight",
                "mixer.out_proj.weight": "mlstm_layer.out_proj.weight",
                "ffn_norm.weight": "norm_ffn.weight",
                "ffn.gate_proj.weight": "ffn.proj_up_gate.weight",
                "ffn.up_proj.weight": "ffn.proj_up.weight",
                "ffn.down_proj.weight": "ffn.proj_down.weight",
            }
        )
    },
)

#: What `weight_mode: fused` keeps as one tensor, by its name.
_FUSED = (
    Entry(
        (
            "mixer.q_proj.weight",
            "mixer.k_proj.weight",
            "mixer.v_proj.weight",
            "mixer.ogate.weight",
        ),
        "mlstm_layer.qkv_opreact.weight",
        STACK,
    ),
    Entry(("mixer.igate.weight", "mixer.fgate.weight"), "mlstm_layer.ifgate_preact.weight", STACK),
    Entry(("mixer.igate.bias", "mixer.fgate.bias"), "mlstm_layer.ifgate_preact.bias", STACK),
    Entry(("ffn.gate_proj.weight", "ffn.up_proj.weight"), "ffn.proj_up_gate_z.weight", STACK),
)
_IN_FUSED = {name for entry in _FUSED for name in entry.ours}

FUSED_TABLE = replace(
    TABLE,
    layers={
        "M": (
            *(entry for entry in TABLE.layers["M"] if entry.ours[0] not in _IN_FUSED),
            *_FUSED,
        )
    },
)

#: What holds for every export of this family, because of transformers' class.
NOTES = (
    "The class ignores the attention mask: do not pad on the left; generate with batch size 1.",
    "For training or plain logits pass `use_cache=False`.",
    "Compute in fp32: transformers' native xLSTM kernels are exact only then.",
)

#: The only value of each key that the class computes.
_FIXED = {
    "norm": "rmsnorm",
    "head_norm": "layernorm",
    "mlstm_gate": "exp",
    "mlstm_normalize": True,
    "mlstm_input_gate": True,
    "mlstm_forget_gate": True,
    "residual": True,
    "dropout": 0.0,
}


def unsupported_reason(model: ModelConfig) -> str | None:
    """Why the class cannot compute a model exactly, as a sentence without its full stop."""
    if set(model.pattern.replace("|", "")) != {"M"}:
        return f"transformers' xlstm has only M blocks, and model.pattern is {model.pattern}"
    for key, wanted in _FIXED.items():
        if getattr(model, key) != wanted:
            return f"transformers' xlstm always has model.{key}={wanted}"
    for key in ("gate_soft_cap", "logit_soft_cap"):
        if getattr(model, key) is None:
            return f"transformers' xlstm always has a model.{key}"
    if model.tie_embeddings:
        return "transformers' xlstm does not tie the embedding to the output layer"
    if model.vocab_tokens is not None:
        return (
            f"transformers' xlstm gives a logit to all {model.vocab_size} rows of the vocabulary, "
            f"and training gave one to the first {model.vocab_tokens} alone (leave --keep-padding "
            "out)"
        )
    widths = dimensions(model)
    if widths.qk % 64 or widths.v % 64:
        return (
            f"transformers' xlstm cannot generate with a cache at widths of q and k {widths.qk}, "
            f"and of v {widths.v}, which are not multiples of 64"
        )
    if feed_forward_factor(model) is None:
        return f"transformers' xlstm has no feed-forward width {widths.ffn} at this hidden size"
    return None


def feed_forward_factor(model: ModelConfig) -> float | None:
    """The factor from which transformers computes the feed-forward width that the model has.

    It rounds another way than we do: floor((f d + m - 1) / m) m.
    """
    width, multiple = dimensions(model).ffn, model.round_up_to
    for factor in (model.ffn_dim_factor, width / model.hidden_size):
        theirs = int((model.hidden_size * factor + multiple - 1) // multiple * multiple)
        if theirs == width:
            return factor
    return None


def config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that describe the model, with kernels that need no more packages."""
    return {
        "architectures": ["xLSTMForCausalLM"],
        "model_type": NAME,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": len(model.pattern.replace("|", "")),
        "num_heads": model.num_heads,
        "tie_word_embeddings": False,
        "norm_eps": model.norm_eps,
        "eps": model.cell_eps,
        "qk_dim_factor": model.qk_dim_factor,
        "v_dim_factor": model.v_dim_factor,
        "ffn_proj_factor": feed_forward_factor(model),
        "ffn_round_up_to_multiple_of": model.round_up_to,
        "gate_soft_cap": model.gate_soft_cap,
        "output_logit_soft_cap": model.logit_soft_cap,
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
        "mode": "inference",
        "chunk_size": 64,
        "autocast_kernel_dtype": "float32",
        "inference_state_dtype": "float32",
        "weight_mode": "single",
        "use_cache": True,
    }


def table(shapes: Mapping[str, Shape]) -> Table:
    """The table of single or of fused weights, by the tensors that are there."""
    return FUSED_TABLE if any(name.endswith(".qkv_opreact.weight") for name in shapes) else TABLE


def model_section(config: ForeignConfig, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The `model:` section of a folder; widths are read from the weights.

    Keys of the published 7B that today's transformers calls otherwise are read too.

    Raises:
        ConvertError: a key or a tensor says what we cannot compute.
    """
    config.must_be("add_out_norm", True)
    config.must_be("use_bias", False)
    vocab, hidden = shape_of(shapes, TABLE.embedding, 2)
    named = config.integer("hidden_size", "embedding_dim", default=hidden)
    layers = count_layers(shapes, TABLE.prefix)
    said = config.integer("num_hidden_layers", "num_blocks", default=layers)
    if (named, said) != (hidden, layers):
        raise ConvertError(
            f"{config.source} says hidden size {named} and {said} layers, the tensors have "
            f"{hidden} and {layers}"
        )
    first = TABLE.prefix.format(n=0)
    v = shape_of(shapes, f"{first}mlstm_layer.multihead_norm.weight", 1)[0]
    fused = f"{first}mlstm_layer.qkv_opreact.weight"
    if fused in shapes:
        qk = (shape_of(shapes, fused, 2)[0] - 2 * v) // 2
    else:
        qk = shape_of(shapes, f"{first}mlstm_layer.q.weight", 2)[0]
    return {
        "pattern": "M" * layers,
        "hidden_size": hidden,
        "num_heads": config.integer("num_heads", default=8),
        "vocab_size": vocab,
        "tie_embeddings": TABLE.head not in shapes,
        "norm_eps": config.number("norm_eps", default=1e-6),
        "cell_eps": config.number("eps", default=1e-6),
        "gate_soft_cap": _cap(config, "gate_soft_cap", default=15.0),
        "logit_soft_cap": _cap(config, "output_logit_soft_cap", default=30.0),
        **width_keys(
            hidden, qk=qk, v=v, ffn=shape_of(shapes, f"{first}ffn.proj_down.weight", 2)[1]
        ),
    }


def _cap(config: ForeignConfig, name: str, *, default: float) -> float | None:
    """A cap; null is none at all."""
    without = name in config.values and config.values[name] is None
    return None if without else config.number(name, default=default)
