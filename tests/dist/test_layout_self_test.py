"""`self-test --layout` passes what is right, and names the parameter that a mistake is in."""

import contextlib
import io
from unittest import mock

import pytest
import torch
import yaml

from pretrain import cli
from pretrain.config import config_from_dict
from pretrain.self_test import layout as layout_test
from pretrain.self_test.compare import position
from pretrain.self_test.smaller import smaller
from tests.dist import work
from tests.dist.needs import needs_deepspeed
from xlstm_mcore.parameters.slices import named_slices

TENSOR = {"layout__tensor": 2, "layout__sequence": True}
ZERO_3 = {"engine__name": "deepspeed", "engine__zero_stage": 3}


def run_config(folder, model="mixed", **changes):
    """A run that no test data are needed for, with the eps of norms that users have."""
    changes = {"model__norm_eps": 1e-6, "optimizer__eps": 1e-8, **changes}
    return work.run_config(model, run__dir=str(folder), data__global_batch=8, **changes)


def compare(config, mistake=None, small=False):
    """(exit code, what is printed) of one rank; `mistake` spoils the engine of several ranks."""
    original = layout_test.make_engine

    def make_engine(part, layout):
        engine = original(part, layout)
        if mistake is not None and layout.world_size > 1:
            mistake(engine, layout)
        return engine

    printed = io.StringIO()
    with (
        mock.patch.object(layout_test, "make_engine", make_engine),
        contextlib.redirect_stdout(printed),
    ):
        return layout_test.main(config, small=small), printed.getvalue()


def first_cause(answers):
    """The first line that a failed test names."""
    return answers[0][1].partition("likeliest cause:\n")[2].splitlines()[0]


def parameter_named(engine, name):
    found = [
        parameter
        for model in engine.models
        for _, parameter, slices in named_slices(model)
        if any(part.name == name for part in slices)
    ]
    return found[0] if found else None


def forget_a_sum(engine, layout):
    """A norm's gradient stays what this tensor-parallel rank has seen of the sequence."""
    parameter_named(engine, "decoder.layers.1.ffn_norm.weight").sequence_parallel = False


def start_elsewhere(engine, layout):
    """One rank draws its own initial values."""
    if layout.rank == 1:
        with torch.no_grad():
            parameter_named(engine, "decoder.layers.2.mixer.out_proj.weight").add_(0.01)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (4, {"layout__context": 2, **TENSOR}),
        (4, {"layout__pipeline": 2, "layout__virtual": 2, "engine__precision": "bf16"}),
        pytest.param(
            2, {"engine__name": "deepspeed", "engine__zero_stage": 3}, marks=needs_deepspeed
        ),
    ],
    ids=["tp_sp_cp", "vpp_dp_bf16", "zero3"],
)
def test_a_layout_of_the_matrix_passes(pool, tmp_path, ranks, changes):
    answers = pool(ranks, compare, run_config(tmp_path, **changes))
    assert [code for code, _ in answers] == [0] * ranks, answers[0][1]
    assert f"passed: {ranks} processes compute the model of one" in answers[0][1]
    assert [text for _, text in answers[1:]] == [""] * (ranks - 1)
    assert not any(tmp_path.iterdir())


@pytest.mark.dist
def test_a_sum_that_is_forgotten_is_named(pool, tmp_path):
    config = run_config(tmp_path, "large", **TENSOR)
    answers = pool(2, compare, config, forget_a_sum)
    assert [code for code, _ in answers] == [3, 3]
    first = first_cause(answers)
    assert "gradients of step 1: decoder.layers.1.ffn_norm.weight differs by" in first


@pytest.mark.dist
def test_other_initial_weights_are_named_with_their_rank(pool, tmp_path):
    answers = pool(2, compare, run_config(tmp_path, layout__tensor=2), start_elsewhere)
    assert [code for code, _ in answers] == [3, 3]
    first = first_cause(answers)
    assert "initial weights: decoder.layers.2.mixer.out_proj.weight differs" in first
    assert first.endswith("in what rank 1 holds")


def test_the_order_of_names_is_that_of_the_forward_pass():
    names = [
        "embedding.word_embeddings.weight",
        "decoder.layers.9.mixer_norm.weight",
        "decoder.layers.9.mixer.q_proj.weight",
        "decoder.layers.9.mixer.head_norm.weight",
        "decoder.layers.9.mixer.out_proj.weight",
        "decoder.layers.9.ffn_norm.weight",
        "decoder.layers.9.ffn.up_proj.weight",
        "decoder.layers.10.mixer_norm.weight",
        "decoder.final_norm.weight",
        "output_layer.weight",
    ]
    assert sorted(reversed(names), key=position) == names


def test_a_large_run_becomes_small_and_keeps_its_layout():
    raw = run_config("unused", "hybrid", layout__pipeline=2).model_dump()
    raw["model"] |= {"pattern": "MMM*M|MMMMM", "hidden_size": 4096, "vocab_size": 50304}
    raw["data"] |= {"seq_len": 8192, "global_batch": 512, "micro_batch": 4}
    config = config_from_dict(raw)
    small = smaller(config, 8)
    assert small.model.pattern == "M*|M" and small.model.hidden_size == 256
    assert (small.data.seq_len, small.data.micro_batch, small.data.global_batch) == (64, 2, 16)
    assert small.layout == config.layout and small.engine == config.engine
    assert small.model.num_heads == config.model.num_heads


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--small"], "give --layout too"),
        (["--layout", "--steps", "4"], "leave one out"),
        (["--nproc", "0"], "use 1 or more"),
        (["--layout", "--nproc", "1"], "give --nproc 2 or more"),
    ],
)
def test_options_that_do_not_fit_are_refused(words, message, capsys):
    assert cli.run(["self-test", "pretrain/configs/cpu_demo.yaml", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.dist
def test_the_command_as_the_documents_show_it(tmp_path, capfd):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(run_config(tmp_path / "run", **TENSOR).model_dump(mode="json")))
    assert cli.run(["self-test", str(path), "--nproc", "2", "--layout", "--small"]) == 0
    assert "layout self-test passed" in capfd.readouterr().out
