"""Credentials in URLs reach no terminal, log or file of a run."""

import logging

import pytest
import yaml

from pretrain.config import load_config, save_config
from pretrain.supervision.progress_file import Progress, read_progress
from pretrain.watching.history import append
from slurm import cli as slurm
from slurm.job.state import RunState, write
from tests.dist.training_runs import tiny_run
from xlstm_io.remote import masked, masked_values
from xlstm_io.terminal import say, tell, until_nobody_reads

SECRETS = {
    "s3://me:hunter2@bucket/x": "s3://***@bucket/x",
    "https://me@host/x": "https://***@host/x",
    "https://host/x?token=hunter2&part=3": "https://host/x?token=***&part=3",
    "https://h/x?X-Amz-Signature=hunter2#a": "https://h/x?X-Amz-Signature=***#a",
    "az://c/x?sig=hunter2": "az://c/x?sig=***",
    "no s3://a:hunter2@b/x and s3://c:hunter2@d": "no s3://***@b/x and s3://***@d",
    "zip://a.json::https://a:hunter2@b/x.zip": "zip://a.json::https://***@b/x.zip",
}


@pytest.mark.parametrize("text", SECRETS)
def test_credentials_are_masked(text):
    assert masked(text) == SECRETS[text] == masked(SECRETS[text])


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/a@b/x", "me@host", "/runs/a", "hf://org/model@main/x", "https://h/x?part=3"],
)
def test_other_texts_stay(text):
    assert masked(text) == text
    assert masked_values({"a": [text, 3, None]}) == {"a": [text, 3, None]}


def test_what_is_printed_and_logged_is_masked(capsys):
    url, log = "s3://me:hunter2@bucket/x", logging.getLogger("test_masked")

    def command():
        say(url)
        tell(f"error: {url}")
        log.propagate = False  # as without pytest: nobody else takes it
        log.warning("passing over %s \x1b[2J", url)
        return 0

    assert until_nobody_reads(command) == 0
    out, err = capsys.readouterr()
    assert "hunter2" not in out + err and "\x1b" not in err
    assert err.count("s3://***@bucket/x") == 2 and "\\x1b[2J" in err


def test_files_of_a_run_are_masked(tmp_path):
    url = "s3://me:hunter2@bucket/run"
    raw = tiny_run(tmp_path, tmp_path, run__init_from=url)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    config = load_config(tmp_path / "run.yaml")
    assert config.run.init_from == url, "the run itself opens it"
    assert config.model_dump()["run"]["init_from"] == url
    assert config.model_dump(mode="json")["run"]["init_from"] == "s3://***@bucket/run"
    save_config(config, tmp_path / "config.yaml")
    Progress("running", 1, 2, 1, checkpoint=url).write(tmp_path)
    append(tmp_path, {"notes": [f"starting from {url}"]})
    assert read_progress(tmp_path).checkpoint == "s3://***@bucket/run"
    for name in ("config.yaml", "progress.json", "history.jsonl"):
        assert "hunter2" not in (tmp_path / name).read_text(), name


def test_files_and_messages_of_a_job_are_masked(tmp_path, capsys):
    url = "s3://me:hunter2@bucket/run"
    RunState(tmp_path).tell("start", f"from {url}")
    write(tmp_path / "state.json", {"words": [url], "more": (url,)})
    assert (tmp_path / "slurm" / "story.jsonl").read_text().count("s3://***@bucket/run") == 1
    assert (tmp_path / "state.json").read_text().count("s3://***@bucket/run") == 2
    assert slurm.run(["submit", "evaluate", url]) == 2
    assert "s3://***@bucket/run" in capsys.readouterr().err
