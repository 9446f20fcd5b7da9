"""What a resume changes is said, and stands in the run's history."""

import json

import pytest

import pretrain.cli
import pretrain.commands.run.train
from pretrain.checkpoint import find_latest, read_manifest
from pretrain.config import ConfigError, config_from_dict, load_config
from pretrain.watching.history import append, read_history
from pretrain.watching.metrics import read_metrics
from tests.dist.training_runs import tiny_run

pytestmark = pytest.mark.dist


def train(raw, tmp_path):
    """Exit code and what was printed, or the message of the error."""
    import contextlib
    import io

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return pretrain.commands.run.train.main(config_from_dict(raw)), said.getvalue()
    except ConfigError as error:
        return str(error), ""


def test_each_start_is_recorded_with_what_it_changes(pool, shards, tmp_path, capsys):
    small = {"evaluation__interval": 100, "checkpoint__interval": 4}
    raw = tiny_run(tmp_path, shards, run__steps=4, **small)
    ((code, said),) = pool(1, train, raw, tmp_path)
    assert code == 0 and "changed since then" not in said
    changed = tiny_run(
        tmp_path, shards, run__steps=6, optimizer__lr=5e-4, layout__tensor=2, **small
    )
    answers = pool(2, train, changed, tmp_path)
    assert [code for code, _ in answers] == [0, 0]
    said = answers[0][1]
    assert "changed since then: run.steps: checkpoint 4, run 6" in said
    assert "changed since then: optimizer.lr: checkpoint 0.001, run 0.0005" in said
    assert "layout.tensor: checkpoint" not in said
    assert "the curve has ended, and its last rate is held (schedule.extend=stretch)" in said

    first, warm, ended, second, done = read_history(tmp_path)
    assert [(e["event"], e["life"], e["step"]) for e in (warm, ended, done)] == [
        ("warmup", 1, 3),
        ("done", 1, 4),
        ("done", 2, 6),
    ]
    assert (first["life"], first["step"], first["processes"], first["changes"]) == (1, 0, 1, [])
    assert (second["life"], second["step"], second["processes"]) == (2, 4, 2)
    assert {c["key"]: (c["before"], c["now"]) for c in second["changes"]} == {
        "run.steps": (4, 6),
        "optimizer.lr": (1e-3, 5e-4),
    }
    configs = [load_config(tmp_path / line["configuration"]) for line in (first, second)]
    assert [config.optimizer.lr for config in configs] == [1e-3, 5e-4], "never overwritten"

    noted = [tmp_path / "starts" / life / "provenance.json" for life in ("000001", "000002")]
    first, second = (json.loads(path.read_text()) for path in noted)
    assert first["versions"] == second["versions"] and first["data"][0]["folder"] == str(shards)
    assert read_manifest(find_latest(tmp_path)).state["provenance"] == second

    # The curve that the extension chose is the checkpoint's, and holds for the next resume.
    rates = {r["step"]: r["lr"] for r in read_metrics(tmp_path / "metrics.jsonl") if "lr" in r}
    assert rates[5] == rates[6] == pytest.approx(5e-5)
    curve = read_manifest(find_latest(tmp_path)).state["curve"]
    assert curve == {"steps": 4, "turns": [{"at": 4, "end": 4, "pace": 0.0}]}

    words = ["--run.steps", "8", "--schedule.extend", "recompute"]
    assert pretrain.cli.run(["check", str(tmp_path / "config.yaml"), *words]) == 0
    said = capsys.readouterr().out
    assert "continues         from step 6 of 8: " in said
    assert "changed since then: run.steps: checkpoint 6, run 8" in said
    assert "learning rate 5e-05 in the last step, 0.000163 in the next" in said

    append(tmp_path, {"event": "x"})
    events = [line["event"] for line in read_history(tmp_path)]
    assert events == ["start", "warmup", "done", "start", "done", "x"]


def test_a_torn_line_of_the_history_is_left_out(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"event": "start"}\n{"event": "st')
    append(tmp_path, {"event": "rewind"})
    assert [line["event"] for line in read_history(tmp_path)] == ["start", "rewind"]
