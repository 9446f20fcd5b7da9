"""Numbers of a run in TensorBoard and in Weights & Biases, over the lives of a run."""

import io
import sys
import time
from types import SimpleNamespace

import pytest

from pretrain.config import RunConfig, check_world, config_from_dict
from pretrain.watching.metric_writers import open_writers
from pretrain.watching.metrics import MetricLogger, read_metrics
from xlstm_io.errors import ConfigError


def run_config(folder, **logging) -> RunConfig:
    return config_from_dict(
        {
            "run": {"dir": str(folder), "steps": 10},
            "model": {"pattern": "M", "hidden_size": 64, "num_heads": 2, "vocab_size": 64},
            "data": {"path": "d", "seq_len": 8, "global_batch": 4, "micro_batch": 2},
            "logging": {"tensorboard": False} | logging,
        }
    )


def log(config, first, last, loss):
    """One life of a run, as the trainer opens and closes its log."""
    folder = config.run.dir
    writers = open_writers(config, first)
    with MetricLogger(
        folder, total_steps=10, start_step=first, writers=writers, stream=io.StringIO()
    ) as metrics:
        for step in range(first + 1, last + 1):
            metrics.log(step, {"tokens": step * 4, "loss": loss})


def test_tensorboard_shows_a_repeated_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = run_config(tmp_path, tensorboard=True)
    log(config, 0, 5, loss=5.0)
    log(config, 3, 6, loss=3.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    assert points == [(1, 5.0), (2, 5.0), (3, 5.0), (4, 3.0), (5, 3.0), (6, 3.0)]


def test_lives_of_a_run_are_one_run_of_wandb(tmp_path, capfd):
    pytest.importorskip("wandb")
    config = run_config(tmp_path / "first", wandb={"project": "trial", "mode": "offline"})
    (tmp_path / "first").mkdir()
    log(config, 0, 5, loss=5.0)
    log(config, 3, 6, loss=3.0)
    name = (tmp_path / "first/wandb-id.txt").read_text().strip()
    files = sorted((tmp_path / "first/wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) in (1, 2), "two lives within a second share a folder"
    for _ in range(1200):  # W&B's process writes when it likes
        if written := all(word in files[-1].read_bytes() for word in (b"loss", b"trial")):
            break
        time.sleep(0.1)
    assert written
    assert "wandb" not in capfd.readouterr().out, "stdout belongs to the run"


class Api(SimpleNamespace):
    """Stands for the package: remembers what it was asked."""

    def __init__(self, fails=""):
        super().__init__(asked=[], fails=fails, Settings=dict)

    def __getattr__(self, name):
        def call(*args, **keys):
            self.asked.append((name, args, keys))
            if name == self.fails:
                raise RuntimeError(f"{name} fails")
            return self

        return call


def test_steps_are_a_value_so_that_a_run_can_go_back(tmp_path, monkeypatch):
    api = Api()
    monkeypatch.setitem(sys.modules, "wandb", api)
    config = run_config(tmp_path, wandb={"project": "p", "entity": "team"})
    log(config, 0, 1, loss=5.0)
    log(config, 0, 1, loss=4.0)
    first, second = (keys for name, _, keys in api.asked if name == "init")
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert (first["project"], first["entity"], first["name"]) == ("p", "team", tmp_path.name)
    assert [args for name, args, _ in api.asked if name == "log"] == [
        ({"step": 1, "tokens": 4, "loss": 5.0},),
        ({"step": 1, "tokens": 4, "loss": 4.0},),
    ]
    assert ("define_metric", ("*",), {"step_metric": "step"}) in api.asked


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_training_goes_on_without_wandb(tmp_path, monkeypatch, caplog, fails):
    api = Api(fails)
    monkeypatch.setitem(sys.modules, "wandb", api)
    log(run_config(tmp_path, wandb={"project": "p"}), 0, 3, loss=5.0)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert caplog.text.count(f"nothing more is sent to Weights & Biases: {fails} fails") == 1
    assert sum(name == fails for name, *_ in api.asked) == 1


def test_without_its_package_a_run_is_refused_and_its_folder_still_read(tmp_path, monkeypatch):
    config = run_config(tmp_path, wandb={"project": "p"})
    check_world(config, 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"project=p, but wandb is not installed; pip install"):
        check_world(config, 1)
    assert run_config(tmp_path, wandb={"project": "p"}) == config
