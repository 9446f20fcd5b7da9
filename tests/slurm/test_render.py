"""Site files, plans and the text of batch files; none of this needs Slurm."""

import json
import os
import re
import shlex
import shutil
import subprocess
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from pretrain.config import load_config
from slurm import cli, submit
from slurm.batch_files.plan import job_name, plan_training
from slurm.batch_files.render import render
from slurm.batch_files.site import Site, SiteError, load_site, site_from_dict, time_limit_seconds
from slurm.batch_files.tasks import (
    plan_conversion,
    plan_evaluation,
    plan_preflight,
    plan_preparation,
)
from xlstm_io.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "slurm" / "examples"
PROJECT = Path("/projects/llm")
DEMO = ROOT / "pretrain/configs/cpu_demo.yaml"
LARGE = ROOT / "pretrain/configs/xlstm_7b.yaml"
NODES = {
    "cpu": (DEMO, 1),
    "gpu_modules": (LARGE, 16),
    "pyxis": (LARGE, 16),
    "apptainer": (LARGE, 8),
}


def tasks(kind, name):
    """The plan of a job around a run, on an example site."""
    loaded = load_site(str(EXAMPLES / f"{name}.yaml"))
    if kind == "preflight":
        return plan_preflight(load_config(DEMO, quiet=True), loaded, 2, folder=PROJECT)
    if kind == "evaluate_each":
        return plan_evaluation(Path("runs/r"), loaded, [], every_minutes=10, folder=PROJECT)
    if kind == "evaluate":
        run, words = Path("runs/r"), ["--data.path", "my shards"]
        return plan_evaluation(run, loaded, words, folder=PROJECT)
    if kind == "convert":
        return plan_conversion(Path("runs/r"), Path("exports/r"), loaded, folder=PROJECT)
    build = (Path("build.yaml"), Path("shards/web"))
    array, merge = plan_preparation(*build, loaded, 64, folder=PROJECT)
    return [array if kind == "prep" else merge]


TASKS = {
    f"{name}.{kind}": partial(tasks, kind, name)
    for kind, name in (
        ("prep", "cpu"),
        ("merge", "cpu"),
        ("preflight", "cpu"),
        ("evaluate_each", "gpu_modules"),
        ("evaluate", "gpu_modules"),
        ("convert", "gpu_modules"),
    )
}


def site(**keys):
    return site_from_dict({"partition": "main", "python": "/usr/bin/python3", **keys}, "site.yaml")


def plan(*, nodes=1, overrides=(), folder=PROJECT, speed=None, **keys):
    config = load_config(DEMO, overrides, quiet=True)
    keys.setdefault("tasks_per_node", 2)
    return plan_training(config, site(**keys), nodes, folder=folder, **(speed or {}))


def example(name):
    """The batch file of an example site."""
    if name in TASKS:
        (plan,) = TASKS[name]()
        return render(plan)
    file, nodes = NODES[name]
    config = load_config(file, quiet=True)
    loaded = load_site(str(EXAMPLES / f"{name}.yaml"))
    return render(plan_training(config, loaded, nodes, folder=PROJECT))


def directives(text):
    """The words of the #SBATCH lines, unquoted."""
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line.removeprefix("#SBATCH "))]


def test_every_example_site_has_a_batch_file():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(NODES)


@pytest.mark.parametrize("name", [*NODES, *TASKS])
def test_examples_are_what_is_rendered_today(name):
    """After a change on purpose: python -m tests.slurm.test_render writes them again."""
    assert (EXAMPLES / f"{name}.sbatch").read_text() == example(name)


@pytest.mark.parametrize("name", [*NODES, *TASKS])
def test_batch_files_are_bash(name, tmp_path):
    path = tmp_path / "job.sbatch"
    path.write_text(example(name))
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize(
    "name", ["job/batch.sh", *(f"examples/{name}.sbatch" for name in (*NODES, *TASKS))]
)
def test_shellcheck_finds_nothing(name):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    # SC1091: the sourced file lies in the run folder. SC2154, SC2034, SC2317: what batch.sh sets
    # and calls.
    words = ["shellcheck", "-S", "warning", "-e", "SC1091,SC2154,SC2034,SC2317"]
    done = subprocess.run(
        [*words, str(ROOT / "slurm" / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


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


def test_every_key_of_the_preflight_reaches_it():
    keys = {
        "command": "true",
        "min_gemm_tflops": 1.0,
        "min_allreduce_gbs": 2.0,
        "max_clock_skew_s": 3.0,
        "min_free_gb": {"run": 4.0, "scratch": 5.0},
    }
    before = plan(health={"preflight": True})
    assert "-m slurm.job.preflight" in render(before) and "slurm.job.preflight" not in render(
        plan()
    )
    for key, value in keys.items():
        assert plan(health={"preflight": True, key: value}).health != before.health


def test_gpus_are_given_per_node_and_bound_to_no_task():
    text = render(plan(gpus_per_node=2))
    assert "--gpus-per-node=2" in directives(text)
    assert "--gpu-bind=none" in text
    assert "--gpus-per-task" not in text
    assert "--gres=gpu:a100:2" in directives(render(plan(gpus_per_node=2, gres="gpu:a100:2")))


AWKWARD = '/projects/it\'s a "run" $HOME `x` #1'


def test_spaces_and_quotes_survive(tmp_path):
    """What bash makes of the file is what was asked for."""
    config = load_config(DEMO, ["--run.dir", f"{AWKWARD}/r"], quiet=True)
    keys = {"env": {"NAME": AWKWARD}, "tasks_per_node": 2}
    text = render(plan_training(config, site(**keys), 1, folder=tmp_path))
    assert f"--output={AWKWARD}/r/slurm/%j.out" in directives(text)
    text = text.replace('source "$XLSTM_RUN/slurm/job/batch.sh"', "srun() { :; }")
    text = text.replace("exec srun", "printf '%s\\n'")
    text = text.replace("xlstm_life requeue", 'echo "$NAME"; echo "$XLSTM_RUN"; xlstm_train_step')
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
    ]
    changes = ["--data.path", "null", "--data.cache_dir", "/cache", "--run.dir", "/projects/r"]
    changes += ["--data.sources", json.dumps(sources)]
    changes += ["--data.valid", json.dumps([{"name": "v", "path": AWKWARD}])]
    config = load_config(DEMO, changes, quiet=True)
    keys = {"scratch": "/my disk", "stage": {"data": True}, "tasks_per_node": 2}
    text = render(plan_training(config, site(**keys), 1, folder=tmp_path))
    text = text.replace('source "$XLSTM_RUN/slurm/job/batch.sh"', "srun() { :; }")
    text = text.replace("exec srun", "printf '%s\\n'")
    last = "XLSTM_SCRATCH=/x; xlstm_stage_step; xlstm_use_stage; xlstm_train_step"
    text = text.replace("xlstm_life requeue", last)
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
    lines = done.stdout.splitlines()
    assert lines[lines.index("/bin/bash") + 2 :][:3] == ["/x", AWKWARD, "shards-0"]
    options = dict(pairwise(lines))
    copy = "/my disk/xlstm-7/shards-0"
    read = json.loads(options["--data.sources"])
    assert [one["path"] for one in read] == [copy, "s3://b/c"]
    assert [one["weight"] for one in read] == [1.0, 1.0]
    assert [one["path"] for one in json.loads(options["--data.valid"])] == [copy]
    words = lines[lines.index("--data.sources") :][:4]
    again = load_config(DEMO, [*changes[:4], *words], quiet=True)
    assert again.data.sources[0].path == copy


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


CHANGES = {
    "partition": "other",
    "name": None,  # for people; nothing depends on it
    "account": "a",
    "qos": "q",
    "reservation": "r",
    "constraint": "c",
    "time": "1:00:00",
    "mail": "x@example.org",
    "nice": 5,
    "gpus_per_node": 2,
    "tasks_per_node": 4,
    "gres": "refused",
    "cpus_per_task": 3,
    "mem": "0",
    "exclusive": False,
    "modules": ["m"],
    "setup": ["true"],
    "python": "/other/python",
    "env": {"A": "b"},
    "scratch": "/local",
    "requeue": "never",
    "extra_sbatch": ["--comment=x"],
    "container": {"kind": "pyxis", "image": "i"},
    "network": {"interface": "ib0"},
    "signal": {"seconds": 900},
    "stage": "needs a disk to copy to",
    "restarts": {"total": 7},
    "health": {"preflight": True},
}


@pytest.mark.parametrize("key", Site.model_fields)
def test_every_key_of_the_site_changes_the_job_or_is_refused(key):
    value = CHANGES[key]
    if value == "refused":
        with pytest.raises(SiteError, match=f"{key}=refused"):
            plan(**{key: value})
    elif key == "stage":
        with pytest.raises(SiteError, match="set scratch, a folder on it"):
            plan(stage={"data": True})
        staged = plan(scratch="/local", stage={"data": True})
        assert staged.staging and plan(scratch="/local").staging is None
    elif value is not None:
        assert plan(**{key: value}) != plan()


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("container", {"mounts": ["/a:/b"], "workdir": "/w", "flags": ["--x"], "python": "p"}),
        ("network", {"env": {"A": "b"}}),
        ("signal", {"name": "USR2"}),
        ("restarts", {"without_progress": 5, "wait_minutes": [2], "max_excluded": 9}),
    ],
)
@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_every_key_of_a_section_changes_the_job(section, keys, kind):
    base = {"kind": kind, "image": "i"}
    before = plan(container=base)
    for key, value in keys.items():
        changed = {"container": base}
        changed[section] = {**changed.get(section, {}), key: value}
        assert plan(**changed) != before, key


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "partition is missing; set it"),
        ({"partition": "x", "partion": 1}, "partion is not a key .*did you mean partition"),
        ({"partition": "x", "time": "soon"}, "time='soon' must be one of Slurm's times"),
        ({"partition": "x", "time": 43200}, 'must be in quotes, as "12:00:00"'),
        ({"partition": "x", "mem": 0}, "mem=0 must be text; put it into quotes"),
        ({"partition": "x", "container": {"kin": "pyxis"}}, "did you mean kind"),
        ({"partition": "x", "container": {"kind": "docker"}}, "container.kind='docker' must be"),
        ({"partition": "x", "extra_sbatch": ["-p y"]}, "must be an option of sbatch"),
        ({"partition": "x", "env": {"a b": "c"}}, "not a name of a variable"),
        ({"partition": "a\nb"}, "must be one line"),
    ],
)
def test_a_bad_site_is_one_message(raw, message):
    with pytest.raises(SiteError, match=message):
        site_from_dict(raw, "site.yaml")


def test_all_problems_of_a_site_come_at_once():
    with pytest.raises(SiteError) as error:
        site_from_dict({"time": "x", "nodes": 3}, "site.yaml")
    assert str(error.value).count("\n  - ") == 3


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


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("2:30", 150), ("1:30:00", 5400), ("2-12", 216000), ("1-0:0:30", 86430)],
)
def test_times_of_slurm(text, seconds):
    assert time_limit_seconds(text) == seconds


def test_names_of_jobs_are_those_of_runs():
    assert job_name(Path("/a/my run")).startswith("xlstm-my_run-")
    assert job_name(Path("/a/run")) != job_name(Path("/b/run"))


def test_keys_of_the_site_and_of_the_run_can_be_given_in_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XLSTM_SITE", raising=False)
    words = ["render", "train", str(DEMO), "--run.dir", "/projects/r"]
    assert cli.run(words) == 2
    assert "no site file" in capsys.readouterr().err
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"partition": "a", "tasks_per_node": 2}))
    assert cli.run([*words, "--set", "partition=b", "--set", "signal.seconds=777"]) == 0
    out = capsys.readouterr().out
    assert {"--partition=b", "--signal=USR1@777"} <= set(directives(out))
    assert re.search(r"train --take-over /projects/r/slurm/run.yaml$", out, flags=re.M)
    assert not Path("/projects/r").exists()
    assert cli.run([*words, "--set", "partition"]) == 2


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
    ("words", "message"),
    [
        (["convert", "a"], "convert takes CKPT and OUT"),
        (["train", "a", "b"], "train takes one FILE"),
        (["evaluate", "a", "--nodes", "2"], "evaluate runs on one node"),
        (["evaluate", "nowhere"], "nowhere is not a folder"),
        (["prep", "a.yaml", "--data.path", "x"], "--data.path is not an option of prep"),
        (["prep", "nowhere.yaml", "--site", str(EXAMPLES / "cpu.yaml")], "does not exist"),
        (["prep", "a.yaml", "--every-checkpoint"], "--every-checkpoint is not an option of prep"),
        (["evaluate", str(ROOT), "--every-checkpoint", "0"], "--every-checkpoint 0 must be above"),
        (["prep", str(DEMO), "--site", str(EXAMPLES / "cpu.yaml")], "has no out"),
    ],
)
def test_words_that_do_not_fit_the_job_are_refused(words, message, capsys):
    assert cli.run(["render", *words]) == 2
    assert message in capsys.readouterr().err


def test_credentials_do_not_reach_the_run_file_of_a_job():
    """Masked, it would not run; and as it is, whoever reads the run folder would have them."""
    config = load_config(DEMO, {"checkpoint.dir": "s3://key:secret@bucket/run"}, quiet=True)
    with pytest.raises(ConfigError, match=r"checkpoint\.dir: the URL has credentials") as caught:
        plan_preflight(config, load_site(str(EXAMPLES / "cpu.yaml")), 2, folder=PROJECT)
    assert "secret" not in str(caught.value)


def test_submitting_needs_slurm_and_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"partition": "a", "tasks_per_node": 2}))
    monkeypatch.setenv("PATH", "/nowhere")
    run = f"/var/tmp/{tmp_path.name}-does-not-exist"
    words = ["submit", "train", str(DEMO), "--site", str(tmp_path / "site.yaml"), "--run.dir", run]
    assert cli.run([*words, "--data.path", str(tmp_path / "none")]) == 2
    assert "problem with what lies on this machine\n" in capsys.readouterr().err
    monkeypatch.setattr(submit, "describe_data", lambda *_, **__: "")
    assert cli.run(words) == 2
    assert "sinfo is not on this machine" in capsys.readouterr().err
    assert cli.run(["status", str(tmp_path)]) == 2
    assert "was never submitted" in capsys.readouterr().err
    assert not Path(run).exists()


if __name__ == "__main__":
    for name in (*NODES, *TASKS):
        (EXAMPLES / f"{name}.sbatch").write_text(example(name))
