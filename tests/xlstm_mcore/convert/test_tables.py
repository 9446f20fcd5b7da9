"""The tables of the converters: every tensor of every block, once, in its shape, both ways."""

import math

import pytest
import torch

from pretrain import layout as layouts
from xlstm_mcore.build import build_model, make_config
from xlstm_mcore.convert.errors import ConvertError
from xlstm_mcore.convert.families import FAMILIES, choose
from xlstm_mcore.convert.tables import RENAME, STACK, rows
from xlstm_mcore.inference import single_process_groups
from xlstm_mcore.parameters.slices import named_slices
from xlstm_mcore.settings import ModelConfig

SMALL = {"hidden_size": 48, "num_heads": 4, "vocab_size": 70, "round_up_to": 16}


@pytest.fixture(scope="module", autouse=True)
def groups():
    yield single_process_groups()
    layouts.leave()


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("Mms*", {"attention_heads": 6, "attention_kv_heads": 2, "qk_dim_factor": 0.75}),
        ("ms", {"conv_width": 0, "tie_embeddings": True, "up_dim_factor": 1.5}),
        ("ml", {"conv_width": 0, "slstm_conv_width": 3}),
        ("sm", {"slstm_conv_width": 0, "slstm_ffn_dim_factor": 0}),
    ],
)
def test_the_tables_have_the_tensors_of_the_model(groups, pattern, keys):
    section = {**SMALL, "pattern": pattern, **keys}
    (model,) = build_model(make_config(section), groups, seed=0)
    built = {p.name: p.global_shape for _, _, slices in named_slices(model) for p in slices}
    table = list(rows(FAMILIES["xlstm_blocks"].TABLE, ModelConfig.model_validate(section)))
    listed = {
        name: shape for row in table for name, shape in zip(row.ours, row.shapes, strict=True)
    }
    assert listed == built
    theirs = [row.theirs for row in table]
    assert len(set(theirs)) == len(theirs)


@pytest.mark.parametrize(("family", "letter"), [("xlstm", "M"), ("llama", "*")])
def test_a_native_table_has_every_tensor_of_its_block_once(family, letter):
    model = ModelConfig(pattern=letter * 2, **SMALL)
    custom = list(rows(FAMILIES["xlstm_blocks"].TABLE, model))
    native = list(rows(FAMILIES[family].TABLE, model))
    assert [row.ours for row in native] == [row.ours for row in custom]
    assert len({row.theirs for row in native}) == len(native)
    assert all(math.prod(row.shape) == sum(map(math.prod, row.shapes)) for row in native)


@pytest.mark.parametrize("transform", [RENAME, STACK])
def test_a_transform_and_its_inverse_give_the_tensors_back(transform):
    ours = [torch.randn(2, 3), torch.randn(4, 3)][: 1 if transform is RENAME else 2]
    shapes = [tuple(t.shape) for t in ours]
    theirs = transform.to_theirs(ours)
    assert tuple(theirs.shape) == transform.shape(shapes)
    assert all(map(torch.equal, transform.to_ours(theirs, shapes), ours))


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        ({"pattern": "M|M", "hidden_size": 128}, "xlstm"),
        ({"pattern": "MM", "hidden_size": 128, "tie_embeddings": True}, "xlstm_blocks"),
        ({"pattern": "MM", "hidden_size": 48}, "xlstm_blocks"),  # its cache would crash
        ({"pattern": "MM", "hidden_size": 128, "mlstm_gate": "sigmoid"}, "xlstm_blocks"),
        ({"pattern": "**", "logit_soft_cap": None}, "llama"),
        ({"pattern": "**"}, "xlstm_blocks"),
        ({"pattern": "ms"}, "xlstm_blocks"),
    ],
)
def test_the_family_is_the_first_that_computes_the_model(keys, family):
    assert choose(ModelConfig.model_validate({**SMALL, **keys})).NAME == family


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("xlstm", "norm", "layernorm"),
        ("xlstm", "head_norm", "rmsnorm"),
        ("xlstm", "mlstm_gate", "sigmoid"),
        ("xlstm", "mlstm_normalize", False),
        ("xlstm", "mlstm_input_gate", False),
        ("xlstm", "mlstm_forget_gate", "bias"),
        ("xlstm", "residual", False),
        ("xlstm", "dropout", 0.1),
        ("xlstm", "gate_soft_cap", None),
        ("xlstm", "logit_soft_cap", None),
        ("xlstm", "tie_embeddings", True),
        ("xlstm", "vocab_tokens", 64),
        ("llama", "norm", "layernorm"),
        ("llama", "logit_soft_cap", 30.0),
        ("llama", "residual", False),
        ("llama", "attention_window", 8),
        ("llama", "dropout", 0.1),
        ("llama", "vocab_tokens", 64),
    ],
)
def test_a_family_is_not_taken_for_what_it_would_compute_otherwise(family, key, value):
    """Such an export would load without an error and be another model."""
    fitting = {"pattern": "MM"} if family == "xlstm" else {"pattern": "**", "logit_soft_cap": None}
    fitting |= {**SMALL, "hidden_size": 128}
    assert choose(ModelConfig.model_validate(fitting)).NAME == family
    assert choose(ModelConfig.model_validate({**fitting, key: value})).NAME == "xlstm_blocks"


def test_a_family_that_cannot_compute_the_model_says_why():
    with pytest.raises(ConvertError, match=r"always has model\.norm=rmsnorm"):
        choose(ModelConfig(pattern="*", norm="layernorm", **SMALL), "llama")
