"""Pairs of one model: ours, and the exported class with the same weights."""

import torch

import xlstm_mcore.hf  # noqa: F401  (registers the class)
from tests.xlstm_mcore.test_model import global_tensors
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.convert.families import FAMILIES
from xlstm_mcore.convert.tables import rows
from xlstm_mcore.hf import XLSTMBlocksConfig, XLSTMBlocksForCausalLM
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.parameters.slices import named_slices

CUSTOM = FAMILIES["xlstm_blocks"]

#: Architectures at awkward sizes: odd widths, heads that do not divide by 4, every ablation key.
ARCHITECTURES = {
    "7b-tied": {"pattern": "MM", "tie_embeddings": True, "qk_dim_factor": 0.75, "cell_eps": 0.3},
    "7b-uncapped": {
        "pattern": "M",
        "gate_soft_cap": None,
        "logit_soft_cap": None,
        "v_dim_factor": 1.5,
    },
    "classic": {"pattern": "mmsm", "norm": "layernorm", "norm_eps": 1e-5, "logit_soft_cap": None},
    "narrow": {"pattern": "ms", "conv_width": 2, "qkv_block_size": 8, "up_dim_factor": 1.2},
    "no-conv": {"pattern": "sm", "conv_width": 0, "norm": "layernorm"},
    "sigmoid": {"pattern": "Mm", "mlstm_gate": "sigmoid", "slstm_forget_gate": "exp"},
    "held-open": {
        "pattern": "Mms",
        "mlstm_input_gate": False,
        "mlstm_forget_gate": False,
        "head_norm": "rmsnorm",
        "slstm_forget_gate": "exp",
    },
    "bare": {
        "pattern": "Mms",
        "head_norm": "none",
        "mlstm_gate": "sigmoid",
        "mlstm_normalize": False,
        "cell_eps": 0.0,
    },
    "lstm": {"pattern": "lsm", "slstm_conv_width": 2, "slstm_input_gate": "sigmoid"},
    "plain-lstm": {
        "pattern": "ll",
        "residual": False,
        "slstm_ffn_dim_factor": 0,
        "conv_width": 0,
        "head_norm": "none",
    },
    "fixed-decay": {
        "pattern": "Mms",
        "mlstm_forget_gate": "bias",
        "conv_width": 0,
        "slstm_conv_width": 3,
    },
    "attention": {"pattern": "**", "attention_heads": 4, "attention_kv_heads": 2},
    "llama": {
        "pattern": "***",
        "attention_heads": 6,
        "attention_kv_heads": 3,
        "logit_soft_cap": None,
        "tie_embeddings": True,
        "rotary_base": 500.0,
    },
    "hybrid": {"pattern": "M*sm", "rotary_base": 100.0, "tie_embeddings": True},
    "window": {"pattern": "*M*", "attention_window": 3, "attention_sinks": 2},
}
#: The few that meet every kind of state.
STATEFUL = ["7b-tied", "classic", "no-conv", "lstm", "hybrid", "window"]


def section_of(name):
    small = {"hidden_size": 48, "num_heads": 3, "vocab_size": 70, "round_up_to": 8}
    if name in ("narrow", "attention"):
        small["num_heads"] = 2
    return {"norm_eps": 1e-4, **small, **ARCHITECTURES[name]}


def our_model(name, **changes):
    """Random weights with which gates, caps and norms all have an effect."""
    config = make_config({**section_of(name), **changes})
    (model,) = build_model(config, single_process_groups(), seed=1)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter, slices in named_slices(model):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
            for part in slices:  # away from exp(-m) >> |n q|, where the memory would not show
                if part.name.endswith("igate.bias"):
                    part.local(parameter).clamp_(min=-1.0)
    return model


def exported_tensors(model, of=lambda p: p.detach()):
    """What `of` takes of our model's parameters, by their names in the exported class."""
    ours = global_tensors(model, of)
    return {
        row.theirs: row.transform.to_theirs([ours[name] for name in row.ours])
        for row in rows(CUSTOM.TABLE, model.config.model)
    }


def exported_model(model):
    """The exported class with the weights of ours, in evaluation mode."""
    keys = {k: v for k, v in CUSTOM.config(model.config.model).items() if k != "auto_map"}
    config = XLSTMBlocksConfig(**keys, vocab_size=model.config.vocab_size, pad_token_id=0)
    exported = XLSTMBlocksForCausalLM(config)
    tensors = {name: t.float() for name, t in exported_tensors(model).items()}
    if model.config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embeddings.weight"]
    exported.load_state_dict(tensors)
    return exported.eval()
