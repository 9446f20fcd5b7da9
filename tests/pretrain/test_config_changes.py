"""Which keys may change on a resume, and what is said about those that did."""

import pytest

from pretrain.checkpoint import CheckpointError, check_same_run
from pretrain.config.changes import RULES, Rule, resume_changes, rules_of
from pretrain.config.schema import FIELDS, SECTIONS
from tests.pretrain.run_files import config, raw


def dumped(**changes):
    return config(**changes).model_dump(mode="json")


def names(before, after):
    return [change.name for change in check_same_run(before, after)]


def test_every_key_has_one_rule_and_every_rule_a_key():
    assert [key for key in FIELDS if rules_of(key) is None] == []
    pseudo = {"tokenizer.sha256", "cursor.plan"}
    for name in RULES.keys() - pseudo:
        section, _, key = name.partition(".")
        assert section in SECTIONS
        assert name in FIELDS or key == "*", name
    used = {key if key in RULES else f"{key.split('.')[0]}.*" for key in FIELDS}
    assert used | pseudo == set(RULES)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"optimizer__lr": 5e-4}, "optimizer.lr"),
        ({"optimizer__betas": [0.9, 0.99]}, "optimizer.betas"),
        ({"optimizer__weight_decay": 0.0}, "optimizer.weight_decay"),
        ({"optimizer__clip_grad": 0.5}, "optimizer.clip_grad"),
        ({"optimizer__decay": {"norm": True}}, "optimizer.decay.norm"),
        ({"schedule__name": "linear"}, "schedule.name"),
        ({"run__steps": 200}, "run.steps"),
        ({"data__global_batch": 32}, "data.global_batch"),
        ({"data__batch_ramp": [{"steps": 2, "global_batch": 8}]}, "data.batch_ramp"),
        ({"engine__precision": "bf16"}, "engine.precision"),
        ({"model__dropout": 0.1}, "model.dropout"),
        ({"guard__stop_on_nonfinite": False}, "guard.stop_on_nonfinite"),
    ],
)
def test_a_change_that_alters_the_result_is_said(change, name):
    assert names(dumped(), dumped(**change)) == [name]


@pytest.mark.parametrize(
    "change",
    [
        {"run__dir": "elsewhere"},
        {"layout__tensor": 2},
        {"layout__pipeline": 2, "model__pattern": "MM|MM"},
        {"memory__recompute": "full"},
        {"data__micro_batch": 2},
        {"data__path": "moved"},
        {"engine__zero_stage": 1},
        {"logging__interval": 1},
        {"checkpoint__keep": 9},
        {"model__chunk_size": 32},
    ],
)
def test_where_and_how_a_run_is_computed_is_nothing_to_say(change):
    assert names(dumped(), dumped(**change)) == []


def test_a_key_that_the_checkpoint_does_not_know_counts_as_its_default():
    before = dumped()
    del before["schedule"]["extend"], before["optimizer"]["clip_grad"], before["guard"]
    assert names(before, dumped()) == []
    assert names(before, dumped(optimizer__clip_grad=0.5)) == ["optimizer.clip_grad"]


def test_what_cannot_be_loaded_is_not_offered_to_be_accepted():
    other = dumped(model__hidden_size=64, model__norm_eps=1e-5, run__seed=1)
    with pytest.raises(CheckpointError) as caught:
        check_same_run(dumped(), other, accept=["model", "run.seed"])
    text = str(caught.value)
    assert "cannot be loaded into this one: model.hidden_size (decides the shapes" in text
    assert "model.hidden_size: checkpoint 128, run 64" in text
    assert "accept_changes" not in text and "norm_eps" not in text
    with pytest.raises(CheckpointError, match=r"accept_changes=run\.seed,model\.norm_eps"):
        check_same_run(dumped(), dumped(model__norm_eps=1e-5, run__seed=1))
    muon = dumped(optimizer__name="muon")
    with pytest.raises(CheckpointError, match="another optimizer has another state"):
        check_same_run(dumped(), muon, accept=["optimizer"])


def test_an_accepted_change_is_said_too():
    changes = check_same_run(dumped(), dumped(run__seed=1), accept=["run.seed"])
    assert [str(change) for change in changes] == ["run.seed: checkpoint 0, run 1"]
    assert changes[0].rule is Rule.ASKED


def test_the_tokenizer_and_the_order_of_samples_are_compared():
    def plan(weight):
        return {"plan": {"phases": {"0": {"x": weight}}}}

    before = {
        **raw(),
        "tokenizer": {"sha256": "a"},
        "cursor": {"plan": {"phases": {"0": {"x": 1}}}},
    }
    now = {**raw(), "tokenizer": {"sha256": "b"}, "cursor": plan(2)}
    found = {change.name: change.rule for change in resume_changes(before, now)}
    assert found == {"tokenizer.sha256": Rule.ASKED, "cursor.plan.phases.0.x": Rule.ASKED}
