"""Every key of the model is declared once, and Megatron's configuration holds the sections."""

import copy
import dataclasses
import pickle

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.config import RunConfig
from xlstm_mcore.build import make_config
from xlstm_mcore.config import XLSTMConfig
from xlstm_mcore.settings import LayoutConfig, MemoryConfig, ModelConfig

MODEL = {"pattern": "Mms*", "hidden_size": 32, "num_heads": 2, "vocab_size": 64}


def test_the_run_file_has_the_sections_themselves():
    fields = RunConfig.model_fields
    assert fields["model"].annotation is ModelConfig
    assert fields["layout"].annotation is LayoutConfig
    assert fields["memory"].annotation is MemoryConfig


def test_the_model_declares_no_key_again():
    own = {f.name for f in dataclasses.fields(XLSTMConfig)}
    own -= {f.name for f in dataclasses.fields(TransformerConfig)}
    assert own == {"model", "memory"}
    keys = {*ModelConfig.model_fields, *MemoryConfig.model_fields}
    assert keys & set(dir(TransformerConfig)) <= {"hidden_size"}, "Megatron means something else"


def test_a_new_key_is_one_entry():
    class WithNewKey(ModelConfig):
        new_key: float = 0.5
        """something new"""

    config = make_config(WithNewKey(**MODEL))
    assert config.new_key == 0.5
    assert make_config(WithNewKey(**MODEL, new_key=2.0)).new_key == 2.0


def test_keys_are_read_like_fields():
    config = make_config(MODEL, memory={"recompute": "full"})
    for key in ModelConfig.model_fields:
        assert getattr(config, key) == getattr(config.model, key)
    assert (config.recompute, config.logits_mib) == ("full", 512)
    assert (config.num_layers, config.num_attention_heads, config.hidden_size) == (4, 2, 32)
    with pytest.raises(AttributeError, match="recompute_all"):
        _ = config.recompute_all
    assert not hasattr(config, "recompute_all")


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_copies_read_the_same(copied):
    config = make_config(MODEL)
    assert copied(config).rotary_base == config.rotary_base
    assert copied(config).model == config.model


@pytest.mark.parametrize("bad", [{"hiden_size": 1}, {"num_heads": 0}, {"pattern": "X"}])
def test_bad_keys_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make_config({**MODEL, **bad})
