"""Single keys: their defaults, limits and names, and the message about a bad one."""

import pytest

from pretrain.config import ConfigError, config_from_dict
from pretrain.config.schema import FIELDS
from tests.pretrain.run_files import config, message, raw


def test_defaults_are_the_7b_style_recipe():
    model = config().model
    assert (model.norm, model.norm_eps, model.gate_soft_cap) == ("rmsnorm", 1e-6, 15.0)
    assert (model.logit_soft_cap, model.igate_bias_init) == (30.0, -10.0)


def test_every_bad_field_is_in_one_message():
    text = message(
        run__steps="many",
        run__step=3,
        model__pattern="MMXM",
        optimizer__lr=-1,
        layout__tensor=3,
    )
    for part in (
        "4 problems",
        "run.steps='many' must be a whole number",
        "run.step is not a key of a run file; did you mean run.steps?",
        "model.pattern='MMXM' has 'X' at position 2",
        "optimizer.lr=-1 must be greater than 0",
    ):
        assert part in text


def test_rules_between_fields_wait_until_every_field_is_sound():
    assert "layout.tensor" in message(model__num_heads=4, layout__tensor=3)
    assert "layout.tensor" not in message(model__hidden_size="wide", layout__tensor=3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer__lerning_rate": 1}, "the keys of optimizer are name, lr"),
        ({"model__hiden_size": 1}, "did you mean model.hidden_size?"),
        ({"data__lr": 1}, "did you mean optimizer.lr?"),
        ({"optimiser__lr": 1}, "did you mean optimizer?"),
        ({"model__tie": True}, "did you mean model.tie_embeddings?"),
        ({"model__num_layers": 2}, "did you mean model.pattern (letter per layer: "),
        ({"data__batch_size": 8}, "did you mean data.global_batch (rows per optimizer step"),
    ],
)
def test_misspelt_keys_get_a_suggestion(changes, says):
    assert says in message(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__pattern": "MM#M"}, "'#' at position 2, which is not a block"),
        ({"model__kernel_backend": "numba"}, "model.kernel_backend"),
        ({"optimizer__decay": {"norms": True}}, "optimizer.decay"),
        ({"engine__zero_stage": 4}, "engine.zero_stage=4 must be less than or equal to 3"),
        ({"model__head_norm": "batchnorm"}, "'layernorm', 'rmsnorm' or 'none'"),
        ({"memory__recompute": "some"}, "'none', 'selective', 'cells' or 'full'"),
        ({"optimizer__betas": [0.9]}, "optimizer.betas"),
        ({"optimizer__betas": [0.9, 1.5]}, "optimizer.betas[1]=1.5 must be less than 1"),
        ({"optimizer__lr": float("inf")}, "must be a finite number"),
        ({"run__dir": 7}, "must be text; put it into quotes"),
        ({"run__seed": -1}, "run.seed=-1"),
        ({"schedule__name": "sine"}, "'cosine', 'exponential' or 'wsd'"),
        ({"model__dropout": 1.0}, "model.dropout=1.0 must be less than 1"),
        (
            {"optimizer__betas": [0.9, 0.9, 0.9]},
            "[0.9, 0.9, 0.9] must have 2 values",
        ),
        ({"optimizer__betas": "0.9"}, "optimizer.betas='0.9' must be a list, such as [0.9, 0.95]"),
        ({"optimizer__decay": "norm"}, "must be keys with values, such as {a: 1}"),
        ({"model__tie_embeddings": "maybe"}, "must be true or false"),
        ({"run__steps": 2.5}, "run.steps=2.5 must be a whole number"),
        ({"optimizer__lr": "high"}, "optimizer.lr='high' must be a number"),
        ({"data__batch_ramp": "{"}, "data.batch_ramp='{' must be a list, such as [a, b]"),
        ({"run__dir": ""}, "run.dir='' must not be empty"),
        ({"engine__precision": "fp8"}, "engine.precision='fp8' must be 'fp32' or 'bf16'"),
    ],
)
def test_a_bad_field_has_one_message(changes, says):
    text = message(**changes)
    assert says in text
    assert "1 problem\n" in text


def test_messages_are_in_our_own_words():
    """Whatever is wrong with any key, nobody has to know pydantic to read the message."""
    read = 0
    for key in FIELDS:
        for value in ("?", -1, 2.5, [], ["?"], {}, {"?": "?"}, [[]], None, True):
            try:
                config_from_dict(raw(**{key.replace(".", "__"): value}))
            except ConfigError as error:
                read += 1
                text = str(error).replace(f"({FIELDS[key].description})", "")
                for phrase in (" valid ", "Input", "String", "Tuple", "List", "Dictionary"):
                    assert phrase not in text, text
    assert read > 300


WRONG = ("", "x", "1.5", -1, 1.5, True, None, [], [[]], {}, {"x": []}, 10**300, float("nan"))


@pytest.mark.parametrize("key", FIELDS)
def test_rules_are_in_plain_words(key):
    """Whatever stands there, pydantic's own words do not reach the user."""
    section, name = key.split(".")
    for value in WRONG:
        values = raw()
        values.setdefault(section, {})[name] = value
        try:
            config_from_dict(values)
        except ConfigError as error:
            for phrase in ("Input", "should", "valid ", "Value error", "instance"):
                assert phrase not in str(error), str(error)
