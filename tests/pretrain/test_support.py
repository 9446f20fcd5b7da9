"""The support matrix as data: its messages, its table in the documents, and its corners."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.commands.before_run.check import describe_run
from pretrain.config import check_world, support, world
from pretrain.config.support import Combination
from tests.pretrain.run_files import config
from xlstm_io.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_the_table_in_the_documents_is_the_matrix():
    """To renew it: print(pretrain.config.support.markdown_table())."""
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    table = support.markdown_table()
    assert sum(table in document.read_text(encoding="utf-8") for document in documents) == 1


def test_every_combination_works_or_has_a_reason_and_a_way_out():
    cells = set(support.supported())
    assert Combination() in cells
    for engine in ("megatron", "deepspeed"):
        for stage in range(4):
            for pipeline in (False, True):
                cell = Combination(engine, zero_stage=stage, pipeline=pipeline)
                assert (support.unsupported_reason(cell) is None) == (cell in cells)
                assert support.suggest(cell) in cells
                assert (support.suggest(cell) == cell) == (cell in cells)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (Combination("deepspeed", zero_stage=2, pipeline=True), "engine.zero_stage=1"),
        (Combination("deepspeed", offload="parameters"), "engine.offload=optimizer"),
        (Combination("deepspeed", zero_stage=0, precision="bf16"), "engine.zero_stage=1"),
        (Combination("megatron", zero_stage=3), "engine.name=deepspeed"),
        (Combination(optimizer="muon"), "engine.zero_stage=0"),
        (Combination(zero_stage=0), "engine.zero_stage=1"),
        (Combination(overlap_param_gather=True), "engine.overlap_grad_reduce=true"),
        (Combination("deepspeed", overlap_grad_reduce=True), "engine.overlap_grad_reduce=false"),
        (Combination(grad_reduce="bf16"), "engine.grad_reduce=fp32"),
    ],
)
def test_the_way_out_is_the_nearest(cell, says):
    assert support.unsupported_reason(cell).endswith(f"works has {says}")


def test_no_combination_gives_up_precision():
    cells = set(support.supported())
    for cell in cells:
        other = "bf16" if cell.precision == "fp32" else "fp32"
        assert replace(cell, precision=other, grad_reduce="fp32") in cells


@pytest.mark.parametrize(
    ("changes", "on_nccl"),
    [
        ({}, (True, True)),
        ({"engine__overlap_param_gather": False}, (True, False)),
        ({"engine__overlap_grad_reduce": False}, (False, False)),
        ({"optimizer__name": "muon"}, (True, False)),
        ({"engine__name": "deepspeed"}, (False, False)),
        ({"engine__name": "deepspeed", "engine__zero_stage": 3}, (True, False)),
    ],
)
def test_what_the_run_file_leaves_open_overlaps_with_nccl_alone(changes, on_nccl):
    run = config(**changes)
    assert support.overlaps(run, "gloo") == (False, False)
    assert support.overlaps(run, "nccl") == on_nccl


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({}, 1),
        ({"optimizer__name": "muon"}, 0),
        ({"engine__name": "deepspeed"}, 1),
        ({"engine__name": "deepspeed", "engine__offload": "parameters"}, 3),
        ({"engine__name": "deepspeed", "engine__overlap_grad_reduce": True}, 2),
        ({"engine__name": "deepspeed", "engine__zero_stage": 2}, 2),
    ],
)
def test_the_zero_stage_follows_from_engine_and_optimizer_unless_it_is_given(changes, stage):
    run = config(**changes)
    assert support.zero_stage(run) == stage
    assert f"ZeRO stage {stage}" in describe_run(run)
    assert run.engine.zero_stage == changes.get("engine__zero_stage")


def test_what_the_run_file_asks_for_is_done_on_every_backend():
    run = config(engine__overlap_grad_reduce=True, engine__overlap_param_gather=True)
    assert support.overlaps(run, "gloo") == support.overlaps(run, "nccl") == (True, True)


def test_a_machine_without_deepspeed_is_told_how_to_get_it(monkeypatch):
    run = config(engine__name="deepspeed")
    assert check_world(run, 1) == 1
    monkeypatch.setattr(world.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'deepspeed>=0\.19,<0\.20'"):
        check_world(run, 1)


@pytest.mark.parametrize("version", ["0.18.2", "0.20.0", "1.0.0"])
def test_other_releases_of_deepspeed_are_refused(monkeypatch, version):
    """A private name that moved would not fail but return the wrong tensor."""
    import types

    import torch

    from pretrain.engines import deepspeed_compat

    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(__version__=version))
    with pytest.raises(ConfigError, match=rf"0\.19\.x, and {version} is installed; pip install"):
        deepspeed_compat.load(torch.device("cpu"))
