"""The text of batch files: what bash makes of it is what was asked for."""

import json
import os
import subprocess

import pytest

from pretrain.config import load_config
from pretrain.data.plan import CACHE_VARIABLE, COPIES_VARIABLE
from slurm.batch_files.plan import plan_training
from slurm.batch_files.render import render
from slurm.batch_files.site import SiteError
from tests.slurm.plans import DEMO, directives, plan, site

AWKWARD = '/projects/it\'s a "run" $HOME `x` #1'


def test_spaces_and_quotes_survive(tmp_path):
    """What bash makes of the file is what was asked for."""
    config = load_config(DEMO, ["--run.dir", f"{AWKWARD}/r"], quiet=True)
    keys = {"env": {"NAME": AWKWARD}, "tasks_per_node": 2}
    text = render(plan_training(config, site(**keys), 1, folder=tmp_path))
    assert f"--output={AWKWARD}/r/slurm/%j.out" in directives(text)
    text = text.replace('source "$XLSTM_RUN/slurm/job/batch.sh"', "srun() { :; }")
    text = text.replace("exec srun", "printf '%s\\n'")
    text = text.replace("\nxlstm_life\n", '\necho "$NAME"; echo "$XLSTM_RUN"; xlstm_train_step')
    done = subprocess.run(
        ["bash", "-c", text],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "XLSTM_LIFE_FOLDER": "life"},
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == [AWKWARD, f"{AWKWARD}/r"]
    assert lines[-1] == f"{AWKWARD}/r/slurm/run.yaml"


def test_the_ranks_read_the_copies_where_every_node_has_them(tmp_path):
    """What bash makes of the words, for a mixture whose folders have awkward names."""
    sources = [
        {"name": "a", "path": AWKWARD, "weight": 1},
        {"name": "b", "path": "s3://b/c", "weight": 1},
        {"name": "c", "path": "web", "weight": 1},
    ]
    changes = ["--data.path", "null", "--data.cache_dir", "/cache", "--run.dir", "/projects/r"]
    changes += ["--data.sources", json.dumps(sources)]
    changes += ["--data.valid", json.dumps([{"name": "v", "path": AWKWARD}])]
    config = load_config(DEMO, changes, quiet=True)
    keys = {"scratch": "/my disk", "stage": {"data": True}, "tasks_per_node": 2}
    text = render(plan_training(config, site(**keys), 1, folder=tmp_path))
    text = text.replace('source "$XLSTM_RUN/slurm/job/batch.sh"', "srun() { :; }")
    text = text.replace("exec srun", "printf '%s\\n'")
    last = "\nxlstm_stage_step; xlstm_use_stage; xlstm_train_step"
    last += f"\nprintenv {COPIES_VARIABLE} {CACHE_VARIABLE}"
    text = text.replace("\nxlstm_life\n", last)
    done = subprocess.run(
        ["bash", "-c", text],
        capture_output=True,
        text=True,
        check=True,
        env={
            **os.environ,
            "XLSTM_LIFE_FOLDER": "life",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "1",
        },
    )
    *lines, copies, cache = done.stdout.splitlines()
    disk = "/my disk/xlstm-7"
    staged = lines[lines.index("/bin/bash") + 2 :][:5]
    assert staged == [disk, AWKWARD, "shards-0", f"{tmp_path}/web", "shards-1"]
    assert json.loads(copies) == {AWKWARD: f"{disk}/shards-0", "web": f"{disk}/shards-1"}
    assert cache == f"{disk}/data"
    assert lines[-1] == "/projects/r/slurm/run.yaml", "no option goes into the checkpoints"


def test_a_virtual_environment_is_copied_and_anything_else_refused(tmp_path):
    (tmp_path / "pyvenv.cfg").touch()
    keys = {"scratch": "/local", "stage": {"venv": True}}
    staged = plan(python=str(tmp_path / "bin/python"), **keys)
    assert staged.staging.copies == ((str(tmp_path), "venv"),)
    assert "XLSTM_RANK_PYTHON=$XLSTM_SCRATCH/venv/bin/python" in render(staged)
    with pytest.raises(SiteError, match="is not in a virtual environment"):
        plan(python="/usr/bin/python3", **keys)
    with pytest.raises(SiteError, match=r"container\.kind=none"):
        plan(container={"kind": "pyxis", "image": "i"}, **keys)


def test_the_submitting_shell_does_not_leak_into_the_file(monkeypatch):
    monkeypatch.setenv("SECRET_OF_MINE", "do not print me")
    before = render(plan())
    monkeypatch.setenv("NCCL_DEBUG", "TRACE")
    assert render(plan()) == before and "do not print me" not in before


def test_values_of_jinja_are_text():
    assert "export A='{{ 7 * 7 }}'" in render(plan(env={"A": "{{ 7 * 7 }}"}))
