"""`check` opens what lies on this machine: data, tokenizer, disk, and the run that continues."""

import re
import shutil

import pytest
import torch
import yaml

from benchmarks.loader.synthetic_shards import write_shards
from pretrain import cli
from pretrain.checkpoint import TensorSlice, save_checkpoint
from pretrain.commands.before_run import check_data
from pretrain.config import config_from_dict, load_config
from pretrain.data import open_plan
from tests.dist.training_runs import tiny_run


@pytest.fixture
def shards(tmp_path):
    write_shards(
        tmp_path / "shards", {"a": [12, 9], "b": [10]}, seq_len=16, vocab_size=96, valid_rows=3
    )
    return tmp_path / "shards"


@pytest.fixture
def check(tmp_path, shards, capsys):
    """Runs `check` on a run file with changes: exit code, output, errors."""

    def run(*words, **changes):
        raw = tiny_run(tmp_path / "run", shards, **changes)
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(raw))
        code = cli.run(["check", str(path), *words])
        return (code, *capsys.readouterr())

    return run


def test_data_tokenizer_and_disk_are_said(check, shards):
    code, out, err = check(run__steps=31)
    assert code == 0, err
    assert f"training data     31 rows of 16 in {shards}, manifest " in out
    assert "4.00 epochs in the run" in out, "31 steps of 4 rows are 4 times 31 rows"
    assert "validation        " in out and "tokenizer         96 tokens" in out
    assert re.search(r"3 checkpoints of 0\.\d[1-9] MB at most; [\d,.]+ GB are free", out), out
    assert "starts            at step 0" in out


def test_each_source_has_its_epochs(check, shards):
    sources = [
        {"name": name, "path": str(shards), "source": name, "weight": weight}
        for name, weight in (("a", 3), ("b", 1))
    ]
    code, out, err = check(run__steps=40, data__path=None, data__sources=sources)
    assert code == 0, err
    assert "a: 21 rows of 16" in out and "b: 10 rows of 16" in out
    a, b = map(float, re.findall(r"([\d.]+) epochs in the run", out))
    assert a > b and a * 21 + b * 10 == pytest.approx(40 * 4, abs=0.2), "each sample once"


def test_all_that_is_wrong_is_one_message_with_exit_code_2(check, shards, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(check_data.shutil, "disk_usage", lambda path: usage)
    code, out, err = check(model__vocab_size=64, data__valid=[{"name": "x", "path": "nowhere"}])
    assert code == 2
    assert "parameters" in out, "what follows from the file alone is printed all the same"
    assert "3 problems with what lies on this machine (--no-data leaves this out)" in err
    for words in (
        "nowhere is not a folder of shards",
        "model.vocab_size=64 is smaller than the 96 tokens",
        "are kept there at once; free space, lower checkpoint.keep=2",
    ):
        assert words in err, words


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__path": "nowhere"}, "nowhere is not a folder of shards"),
        ({"data__seq_len": 32}, "data.seq_len=32 is not"),
    ],
)
def test_wrong_data_are_found_here_unless_left_out(check, changes, says):
    code, _, err = check(**changes)
    assert code == 2 and err.count(says) == 1, "training and validation data, and said once"
    code, out, err = check("--no-data", **changes)
    assert code == 0 and "training data" not in out


def test_a_run_folder_that_cannot_be_made_is_said(check, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    code, _, err = check(run__dir=str(tmp_path / "file" / "run"))
    assert code == 2 and f"{tmp_path / 'file'} is not a folder; set another run.dir" in err
    monkeypatch.setattr(check_data.os, "access", lambda path, mode: False)
    code, _, err = check()
    assert code == 2 and f"{tmp_path} may not be written to; set another run.dir" in err


def test_a_run_that_had_checkpoints_and_lost_them_is_said(check, tmp_path):
    (tmp_path / "run").mkdir()
    progress = '{"status": "done", "step": 9, "steps": 9, "life": 1, "checkpoint": "gone"}'
    (tmp_path / "run" / "progress.json").write_text(progress)
    code, _, err = check()
    assert code == 2 and "had done 9 steps and saved gone" in err


def test_a_run_goes_on_from_its_own_checkpoint(check, shards, tmp_path):
    """Also where the trainer has filled in what the run file leaves out."""
    config = config_from_dict(tiny_run(tmp_path / "run", shards, model__vocab_tokens=96))
    plan = open_plan(config.data, config.run.seed)
    state = {
        "tokenizer": {"sha256": plan.manifest.tokenizer_sha256},
        "cursor": {"consumed_samples": 28, "plan": plan.describe(28)},
    }
    part = TensorSlice("w", (2,), (0,), torch.ones(2))
    saved = config.model_dump(mode="json")
    folder = save_checkpoint(tmp_path / "run" / "checkpoints", [part], state, saved, step=7)
    code, out, err = check()
    assert code == 0, err
    assert f"continues         from step 7 of 24: {folder}" in out
    assert "changed since then" not in out
    code, _, err = check(model__vocab_tokens=100)
    assert code == 2 and "model.vocab_tokens: checkpoint 96, run 100" in err


def test_how_many_checkpoints_lie_there_at_once(tmp_path, shards):
    path = tmp_path / "run.yaml"

    def kept(**changes):
        path.write_text(yaml.safe_dump(tiny_run(tmp_path, shards, **changes)))
        return check_data.checkpoints_kept(load_config(path))

    assert kept() == 3, "two, and one half written"
    assert kept(checkpoint__keep=99) == 12, "no more than are saved"
    assert kept(checkpoint__keep_best=2, checkpoint__keep_every=8) == 2 + 2 + 3 + 1


def test_the_weights_that_a_run_would_start_from_are_opened(check, shards, tmp_path):
    config = config_from_dict(tiny_run(tmp_path / "first", shards))
    plan = open_plan(config.data, config.run.seed)
    state = {"tokenizer": {"sha256": plan.manifest.tokenizer_sha256}}
    part = TensorSlice("w", (2,), (0,), torch.ones(2))
    saved = config.model_dump(mode="json")
    first = save_checkpoint(tmp_path / "first", [part], state, saved, step=7)
    origin = {"run__init_from": str(tmp_path / "first")}
    code, out, err = check(**origin)
    assert code == 0, err
    assert f"from the weights of {first}, without its optimizer state" in out
    code, out, _ = check(**origin, model__norm_eps=1e-3)
    assert code == 0 and "other than there: model.norm_eps" in out
    code, _, err = check(**origin, model__hidden_size=64)
    assert code == 2 and "hidden_size: checkpoint 32, run 64" in err
    code, _, err = check(**origin, run__init_optimizer=True)
    assert code == 2 and "has no optimizer state; set it to false" in err
    (first / "metadata.json").write_text("{}")
    code, _, err = check(**origin)
    assert code == 2 and "metadata.json has 2 bytes" in err
    code, _, err = check(run__init_from=str(tmp_path / "gone"))
    assert code == 2 and "gone: no such folder" in err
