"""transformers' own `xlstm`: models of `M` blocks alone, as xLSTM 7B is published.

Both sides store weights as (out, in) with each projection on its own, and norm weights are plain,
so converting is renaming. What the class cannot compute is listed in `unsupported_reason`.
"""

from typing import Any

from xlstm_mcore.convert.tables import Table, renames
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
