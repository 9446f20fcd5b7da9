"""The summary of a run, finished and not."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.commands.after_run import report
from pretrain.config import config_from_dict, save_config
from xlstm_io.errors import UserError

BASELINES = {"unigram": 6.4, "bigram_add_one": 5.3, "bigram_kneser_ney": 4.3}


@pytest.fixture
def make_run(tmp_path):
    def make(valid_loss=4.6, steps=200, done=200, summary=True, records=True):
        folder = tmp_path / "run"
        config = config_from_dict(
            {
                "run": {"dir": str(folder), "steps": steps},
                "model": {"pattern": "MM", "hidden_size": 64, "num_heads": 2, "vocab_size": 64},
                "data": {"path": "d", "seq_len": 8, "global_batch": 4, "micro_batch": 2},
            }
        )
        save_config(config, folder / "config.yaml")
        if records:
            lines = [
                {"step": step, "tokens": step * 30, "loss": 5.0, "tokens_per_second": 900.0}
                for step in range(10, done + 1, 10)
            ]
            lines[-1]["valid_loss"] = valid_loss
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text)
        if summary:
            content = {
                "steps": done,
                "tokens": done * 30,
                "parameters": 4_500_000,
                "valid_loss": valid_loss,
                "seconds": 100.0,
                "tokens_per_second": 2345.6,
                "peak_memory_bytes": {"sum": 3 * 2**30, "max": 2 * 2**30},
            }
            (folder / "summary.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.fixture
def baselines(tmp_path):
    path = tmp_path / "baselines.json"
    path.write_text(json.dumps(BASELINES | {"tokens": 37000}))
    return path


def test_a_good_run(make_run, baselines, capsys):
    folder = make_run(valid_loss=4.6)
    assert report.main([folder], baselines) == 0
    text = capsys.readouterr().out
    assert "finished, 200 of 200 steps" in text
    assert "goal met: 0.700 nat below the add-one bigram" in text
    order = [text.index(name) for name in ("unigram", "add-one", "this model", "Kneser-Ney")]
    assert order == sorted(order), "losses are listed from the highest to the lowest"
    assert "2,346 tokens/s" in text
    assert "3.00 GiB over all processes, 2.00 GiB in one" in text
    assert f"loss curve        {folder / 'loss.png'}" in text
    assert f"this summary      {folder / 'summary.txt'}" in text
    assert "Hugging Face" not in text, "there is no export here"
    assert f"launch {folder / 'config.yaml'} --run.steps 400\n" in text
    assert "the curve has ended, and its last rate is held (schedule.extend=stretch)" in text
    assert (folder / "summary.txt").read_text() == text
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (4.999, "goal met: 0.301 nat below"),
        (5.001, "goal NOT met: 0.299 nat below"),
        (5.9, "goal NOT met: 0.600 nat above"),
    ],
)
def test_the_goal(make_run, baselines, capsys, loss, says):
    assert report.main([make_run(valid_loss=loss)], baselines) == 0
    out = capsys.readouterr().out
    assert says in out and ("takes a few hundred steps" in out) == ("NOT" in says)


def test_baselines_are_remembered(make_run, baselines, capsys):
    folder = make_run()
    report.main([folder], baselines)
    first = capsys.readouterr().out
    assert report.main([folder]) == 0
    assert "goal met" in capsys.readouterr().out
    assert first


def test_without_baselines_it_says_how_to_get_them(make_run, capsys):
    assert report.main([make_run()]) == 0
    out = capsys.readouterr().out
    assert "this model" in out
    assert "no baselines given" in out
    assert "a few hundred steps" not in out, "advice stands where it applies"


def test_an_unfinished_run_is_told_from_its_metrics(make_run, baselines, capsys):
    folder = make_run(summary=False, done=50)
    assert report.main([folder], baselines) == 0
    out = capsys.readouterr().out
    assert "not finished, 50 of 200 steps" in out
    assert "1,500 tokens" in out
    assert "900 tokens/s" in out
    assert "go on" in out
    assert "--run.steps 200" in out


def test_an_old_summary_does_not_hide_a_longer_run(make_run, capsys):
    folder = make_run(done=50, steps=50)
    longer = yaml.safe_load((folder / "config.yaml").read_text())
    longer["run"]["steps"] = 100
    (folder / "config.yaml").write_text(yaml.safe_dump(longer))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 80, "loss": 3.0, "tokens": 2400}) + "\n")
    assert report.main([folder]) == 0
    assert "not finished, 80 of 100 steps" in capsys.readouterr().out


def test_a_run_that_has_not_begun(make_run, capsys):
    folder = make_run(summary=False, records=False)
    assert report.main([folder]) == 0
    out = capsys.readouterr().out
    assert "none yet: no evaluation has run" in out
    assert not (folder / "loss.png").exists()


def test_bad_input_is_the_users_to_fix(tmp_path, make_run):
    with pytest.raises(UserError, match="is not a folder"):
        report.main([tmp_path / "nothing"])
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        report.main([tmp_path])
    folder = make_run()
    with pytest.raises(UserError, match=r"does not exist; it is made by python -m data_prep"):
        report.main([folder], tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        report.main([folder], tmp_path / "bad.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="has none of unigram"):
        report.main([folder], tmp_path / "other.json")


def test_programs_are_named_so_that_they_can_be_typed(monkeypatch):
    folder = Path(sys.executable).parent.resolve()  # the environment may be a link
    monkeypatch.setattr(sys, "executable", str(folder / Path(sys.executable).name))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin")
    assert report.program("python") == "python"
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(folder.parent)
    assert report.program("python") == "bin/python"
