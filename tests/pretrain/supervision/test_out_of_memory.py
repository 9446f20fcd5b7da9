"""What is said when a device has no memory left, and who has to do something about it."""

from pathlib import Path

import pytest
import torch

from pretrain.config import RunConfig
from pretrain.planning.advice import steps_down, text
from pretrain.supervision import out_of_memory as module
from pretrain.supervision.out_of_memory import is_out_of_memory, out_of_memory
from pretrain.supervision.progress_file import Progress
from xlstm_io.errors import ConfigError, ExitCode, MachineFailed

CONFIG = RunConfig(
    run={"dir": "runs/x", "steps": 100},
    model={"pattern": "MM", "hidden_size": 64, "num_heads": 2, "vocab_size": 64},
    data={"path": "shards", "seq_len": 32, "global_batch": 16, "micro_batch": 4},
)
FOUND = {
    "now": {"weights": 2e9, "activations of M": 70e9, "other": 1e6},
    "changes": [["--memory.recompute full", 78e9], ["and --data.micro_batch 2", 30e9]],
}
ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore words")


def said(error, steps, tmp_path, monkeypatch, before=0):
    monkeypatch.setattr(module, "ask", lambda *_: FOUND)
    monkeypatch.setattr(module.hardware, "device_memory_bytes", lambda: int(80e9))
    place = {"rank": 3, "processes": 8, "folder": tmp_path}
    return out_of_memory(error, CONFIG, steps=steps, before=before, **place)


def test_in_the_first_steps_the_run_file_is_to_be_changed(tmp_path, monkeypatch):
    found = said(ERROR, 1, tmp_path, monkeypatch)
    assert isinstance(found, ConfigError) and found.exit_code == ExitCode.BAD_INPUT
    assert str(found).splitlines()[0] == (
        "rank 3 ran out of memory after 1 step of this start: CUDA out of memory. Tried to "
        "allocate 2 GiB."
    )
    assert "the fullest rank has 72.0 GB at its peak" in str(found)
    assert "room for 76.0 GB: activations of M 70.0 GB, weights 2.0 GB\n" in str(found)
    assert "--memory.recompute full: 78.0 GB\n" in str(found)
    assert "and --data.micro_batch 2: 30.0 GB, which fits" in str(found)
    assert "more words" not in str(found) and "snapshot" not in str(found)


def test_later_the_same_command_may_be_repeated(tmp_path, monkeypatch):
    found = said(ERROR, 500, tmp_path, monkeypatch)
    assert isinstance(found, MachineFailed)
    assert "so repeat the command" in str(found) and "GB at its peak" not in str(found)


def test_a_run_of_days_is_not_given_up_for_the_first_step_of_a_life(tmp_path, monkeypatch):
    """The memory may be that of a process which the last start left on the device."""
    found = said(ERROR, 1, tmp_path, monkeypatch, before=5000)
    assert isinstance(found, MachineFailed)
    assert "the run has done 5,000 steps before" in str(found)
    assert "and --data.micro_batch 2: 30.0 GB, which fits" in str(found)


@pytest.mark.parametrize(("steps", "kind"), [(5000, MachineFailed), (0, ConfigError)])
def test_nor_while_its_model_is_built(steps, kind, tmp_path, monkeypatch):
    """There is no trainer then, and the file of the last life says how far the run is."""
    monkeypatch.chdir(tmp_path)
    Progress("running", step=steps, steps=9000, life=1).write(Path(CONFIG.run.dir))
    assert isinstance(said(ERROR, 0, tmp_path, monkeypatch, before=None), kind)


def test_a_snapshot_is_kept_where_the_device_has_one(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        module.hardware, "save_memory_snapshot", lambda path: not saved.append(path)
    )
    found = said(ERROR, 1, tmp_path, monkeypatch)
    assert saved == [tmp_path / "memory-rank_3.pickle"] and str(saved[0]) in str(found)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (ERROR, True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_which_errors_are_about_memory(error, is_one, tmp_path, monkeypatch):
    assert is_out_of_memory(error) is is_one
    assert (said(error, 1, tmp_path, monkeypatch) is not None) is is_one


def test_changes_come_from_the_cheapest_on():
    told = [words for words, _ in steps_down(CONFIG)]
    assert told == [
        "--memory.recompute selective",
        "--memory.recompute cells",
        "--memory.recompute full",
        "and --data.micro_batch 2",
        "and --data.micro_batch 1",
        "and --layout.tensor 2 --layout.sequence true",
    ]
    _, last = list(steps_down(CONFIG))[-1]
    assert (last.recompute, last.micro_batch, last.tensor) == ("full", 1, 2)


def test_without_a_count_the_order_is_said():
    words = text(None, 8, 80e9)
    assert words.index("recompute") < words.index("micro_batch") < words.index("layout.tensor")
    assert "python -m pretrain plan RUN_FILE --gpus 8" in words
