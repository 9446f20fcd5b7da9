"""Plans of jobs: what Slurm is asked for, and what cannot work."""

import re
from pathlib import Path

import pytest

from pretrain.config import load_config
from slurm.batch_files import plan as planning
from slurm.batch_files.plan import job_name
from slurm.batch_files.render import render
from slurm.batch_files.site import SiteError, load_site
from slurm.batch_files.tasks import plan_evaluation, plan_preflight
from slurm.job.state import Policy, RunState
from tests.slurm.plans import DEMO, EXAMPLES, PROJECT, directives, example, plan, tasks
from xlstm_io.errors import ConfigError


def test_an_ordinary_job_asks_for_what_it_needs():
    options = directives(render(plan(time="2:00:00")))
    for wanted in (
        "--nodes=1",
        "--ntasks-per-node=2",
        "--time=2:00:00",
        "--requeue",
        "--open-mode=append",
        "--signal=USR1@120",
        "--export=NONE",
        "--exclusive",
        f"--output={PROJECT}/runs/cpu_demo/slurm/%j.out",
    ):
        assert wanted in options
    assert not [option for option in options if option.startswith("--nodelist")]


def test_gpus_are_given_per_node_and_bound_to_no_task():
    text = render(plan(gpus_per_node=2))
    assert "--gpus-per-node=2" in directives(text)
    assert "--gpu-bind=none" in text
    assert "--gpus-per-task" not in text
    assert "--gres=gpu:a100:2" in directives(render(plan(gpus_per_node=2, gres="gpu:a100:2")))


def test_an_array_names_its_share_and_asks_for_no_gpu():
    text = example("cpu.prep")
    assert "--array=0-63" in directives(text)
    assert '--tasks 64 --task "$SLURM_ARRAY_TASK_ID"' in text
    for kind in ("prep", "merge", "convert"):
        (plan,) = tasks(kind, "gpu_modules")
        assert not re.search("gres|gpus-per-node", " ".join(plan.options))
        assert "--gpu-bind=none" not in plan.step
    (plan,) = tasks("evaluate", "gpu_modules")
    assert "--gres=gpu:a100:4" in plan.options and "--ntasks-per-node=4" in plan.options


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"nodes": 3}, "3 nodes with 2 ranks each: .*numbers of nodes that fit: .*[24]"),
        ({"nodes": 0}, "--nodes 0"),
        ({"overrides": ["--run.dir", "/tmp/run"]}, "disk of each node's own"),
        ({"overrides": ["--run.dir", "/local/run"], "scratch": "/local"}, "of each node's own"),
        ({"overrides": ["--run.dir", "/projects/100%"]}, "has a % or a line break"),
        ({"time": "2:00"}, "time=2:00 ends before a run can stop"),
        ({"speed": {"save_s": 900.0}, "time": "1:00:00"}, "a save takes 900 s"),
        ({"extra_sbatch": ["--partition=x"]}, "is set by partition"),
        ({"extra_sbatch": ["--nodelist=n1"]}, "waits for ever"),
        ({"container": {"image": "x"}}, "container.kind=none"),
        ({"container": {"kind": "pyxis"}}, "needs container.image"),
        ({"health": {"command": "true"}}, "health.command is set, and health.preflight=false"),
    ],
)
def test_what_cannot_work_is_refused(keys, message):
    with pytest.raises((SiteError, ConfigError), match=message):
        plan(**keys)


def test_the_signal_comes_early_enough_for_a_save():
    assert plan(speed={"save_s": 100.0, "step_s": 20.0}).signal_s == 300
    assert plan(speed={"save_s": 1.0, "step_s": 1.0}).signal_s == 120
    assert plan().policy.stops_in_time, "what is learnt later is seen to in the life"
    assert not plan(signal={"seconds": 90}).policy.stops_in_time


def test_names_of_jobs_are_those_of_runs():
    assert job_name(Path("/a/my run")).startswith("xlstm-my_run-")
    assert job_name(Path("/a/run")) != job_name(Path("/b/run"))


def test_credentials_do_not_reach_the_run_file_of_a_job():
    """Masked, it would not run; and as it is, whoever reads the run folder would have them."""
    config = load_config(DEMO, {"checkpoint.dir": "s3://key:secret@bucket/run"}, quiet=True)
    with pytest.raises(ConfigError, match=r"checkpoint\.dir: the URL has credentials") as caught:
        plan_preflight(config, load_site(str(EXAMPLES / "cpu.yaml")), 2, folder=PROJECT)
    assert "secret" not in str(caught.value)


def test_a_batch_file_with_credentials_is_refused():
    with pytest.raises(ConfigError, match=r"\(export A=https://\*\*\*@proxy/\)") as caught:
        render(plan(setup=["export A=https://me:secret@proxy/"]))
    assert "secret" not in str(caught.value)


def test_every_checkpoint_of_a_run_is_looked_for_in_its_folder(tmp_path, monkeypatch):
    """Where they lie elsewhere the job would find none, and wait for ever."""
    monkeypatch.setattr(planning, "OWN_OF_A_NODE", ())  # in one of which the tests work
    files, site = RunState(tmp_path), load_site(str(EXAMPLES / "cpu.yaml"))
    for folder in (str(tmp_path / "checkpoints"), "/fast/run", None):
        files.save_policy(Policy(steps=10, checkpoints=folder))
        assert plan_evaluation(tmp_path, site, [])
        if folder == str(tmp_path / "checkpoints"):
            assert plan_evaluation(tmp_path, site, [], every_minutes=1)
            continue
        with pytest.raises(ConfigError, match="evaluate its checkpoints one by one"):
            plan_evaluation(tmp_path, site, [], every_minutes=1)
