"""Ranks of processes that srun started: taken from Slurm, or refused with the reason."""

import os
import sys
import types

import pytest
import yaml

from pretrain import cli
from pretrain.processes.slurm_ranks import adopt_ranks, first_host, tasks_per_node
from tests.pretrain.test_cli import CONFIG
from xlstm_io.errors import ConfigError
from xlstm_io.rendezvous import rendezvous_port

STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_STEP_NODELIST": "n[07-08]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


@pytest.fixture
def in_a_step(monkeypatch):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what the command sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "mine")


def test_ranks_are_those_of_slurm():
    found = dict(STEP)
    adopt_ranks(found)
    added = {name: value for name, value in found.items() if name not in STEP}
    assert added == {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n07",
        "MASTER_PORT": str(20000 + 1234 + 37 * 2),
    }


def test_every_start_of_a_job_meets_on_another_port_below_those_of_clients():
    ports = {rendezvous_port(11_999, turn) for turn in range(300)}
    assert len(ports) == 300 and min(ports) >= 20000 and max(ports) < 32768
    again = {**STEP, "SLURM_RESTART_COUNT": "1"}
    adopt_ranks(again)
    assert again["MASTER_PORT"] == str(20000 + 1234 + 37 * 102)


@pytest.mark.parametrize(
    "environment",
    [
        {**STEP, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "6"},  # the batch script, outside of srun
    ],
    ids=["under torchrun", "one task", "no step"],
)
def test_other_processes_keep_their_variables(environment):
    before = dict(environment)
    adopt_ranks(environment)
    assert environment == before


def test_half_a_set_of_variables_is_refused():
    with pytest.raises(ConfigError, match="RANK is set and WORLD_SIZE, LOCAL_RANK is not"):
        adopt_ranks({**STEP, "RANK": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n7", "n7"),
        ("n[3-5,9],m1", "n3"),
        ("gpu-[007,011]", "gpu-007"),
        ("rack[2-3]n[10-11]-ib", "rack2n10-ib"),
        ("a,b[1-2]", "a"),
    ],
)
def test_first_host_of_slurms_notation(nodes, first):
    assert first_host(nodes) == first


def test_tasks_of_slurms_notation():
    assert tasks_per_node("4(x2),2") == [4, 4, 2]
    assert tasks_per_node("8") == [8]


def stand_in(monkeypatch, name, function="main"):
    """A module that notes the rank with which it is called."""
    seen = []
    module = types.ModuleType(name)

    def call(*args, **keys):
        seen.append(os.environ.get("RANK"))
        return 0

    setattr(module, function, call)
    monkeypatch.setitem(sys.modules, name, module)
    return seen


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("pretrain.commands.run.train", ["train", "RUN"]),
        ("pretrain.commands.after_run.evaluate", ["evaluate", "CKPT", "RUN"]),
        ("pretrain.commands.after_run.generate", ["generate", "CKPT"]),
        ("pretrain.self_test.resume", ["self-test", "RUN"]),
    ],
)
def test_commands_of_several_processes_take_their_rank(
    module, words, run_file, in_a_step, monkeypatch
):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # the nodes of the step have no address here
    seen = stand_in(monkeypatch, module)
    words = [run_file if word == "RUN" else word for word in words]
    batch = ["--data.global_batch", "8"] if run_file in words else []
    assert cli.run([*words, *batch]) == 0
    assert seen == ["3"]


@pytest.mark.parametrize("command", ["launch", "self-test"])
def test_workers_of_one_machine_are_refused_in_a_job_of_several(
    command, run_file, monkeypatch, capsys
):
    workers = stand_in(monkeypatch, "pretrain.commands.run.launch", "launch")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    assert cli.run([command, run_file]) == 2
    assert "srun --ntasks-per-node=N python -m pretrain" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")  # a step on one of the nodes, with one task
    assert cli.run([command, run_file]) == 0
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert cli.run([command, run_file]) == 0
    assert len(workers) == 2
