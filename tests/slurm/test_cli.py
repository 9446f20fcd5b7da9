"""The words of `python -m slurm`, without a Slurm."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.commands.before_run import check_data
from slurm import cli
from slurm.job.state import CHECKPOINTS_FOLDER
from tests.slurm.plans import DEMO, EXAMPLES, ROOT, directives
from xlstm_io.checkpoint import manifest


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


def test_a_reader_that_ends_ends_the_command():
    words = ["render", "train", str(DEMO), "--site", str(EXAMPLES / "cpu.yaml")]
    command = [sys.executable, "-m", "slurm", *words, "--run.dir", "/projects/r"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_rendering_needs_no_torch():
    """Its import takes seconds, on a login node with a slow file system a minute."""
    example = EXAMPLES / "cpu.yaml"
    words = ["render", "train", str(DEMO), "--site", str(example), "--run.dir", "/projects/r"]
    script = (
        "import sys; from slurm import cli; cli.run(sys.argv[1:]); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("\nxlstm_life\nFalse\n")
    assert CHECKPOINTS_FOLDER == manifest.CHECKPOINTS_FOLDER


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "a"], "convert takes CKPT and OUT"),
        (["train", "a", "b"], "train takes one FILE"),
        (["evaluate", "a", "--nodes", "2"], "evaluate runs on one node"),
        (["evaluate", "a", "--engine.precision", "bf16"], "evaluate would not use this"),
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


def test_submitting_needs_slurm_and_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"partition": "a", "tasks_per_node": 2}))
    monkeypatch.setenv("PATH", "/nowhere")
    run = f"/var/tmp/{tmp_path.name}-does-not-exist"
    words = ["submit", "train", str(DEMO), "--site", str(tmp_path / "site.yaml"), "--run.dir", run]
    assert cli.run([*words, "--data.path", str(tmp_path / "none")]) == 2
    assert "problem with what lies on this machine\n" in capsys.readouterr().err
    monkeypatch.setattr(check_data, "describe_data", lambda *_, **__: "")
    assert cli.run(words) == 2
    assert "sinfo is not on this machine" in capsys.readouterr().err
    assert cli.run(["status", str(tmp_path)]) == 2
    assert "was never submitted" in capsys.readouterr().err
    assert not Path(run).exists()
