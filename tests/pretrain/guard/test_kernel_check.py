"""When a run compares its kernels with their references, and what follows."""

import functools
import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch

from pretrain.guard import kernel_check
from pretrain.guard.kernel_check import check_kernels_once
from tests.pretrain.run_files import config
from xlstm_io.errors import MachineFailed
from xlstm_kernels import mlstm_chunkwise, self_check
from xlstm_mcore import hardware
from xlstm_mcore import kernel_check as compared

CPU, DEVICE = torch.device("cpu"), torch.device("meta")  # no kernel runs on the second
SMALL = {
    "model__hidden_size": 32,
    "model__num_heads": 2,
    "model__pattern": "Mmsld",
    "model__kernel_backend": "torch",  # the others compile first
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / kernel_check.FOLDER


def test_the_kernels_of_a_model_with_every_cell_agree(cache):
    check_kernels_once(config(**SMALL, guard__kernel_check="always"), CPU)
    (note,) = cache.iterdir()
    assert json.loads(note.read_text())["precision"] == "fp32"


def test_a_planted_wrong_kernel_stops_the_run_before_it_trains(cache, monkeypatch):
    def planted(q, *rest, **options):
        return mlstm_chunkwise(q * 1.1, *rest, **options)

    monkeypatch.setattr(self_check, "mlstm_chunkwise", planted)
    wanted = config(**SMALL, guard__kernel_check="always")
    with pytest.raises(MachineFailed, match=r"mlstm_chunkwise on cpu in float32, hidden states"):
        check_kernels_once(wanted, CPU)
    assert not cache.exists()
    check_kernels_once(config(**SMALL, guard__kernel_check="off"), CPU)
    check_kernels_once(config(**SMALL), CPU)  # once: not on a CPU


def test_every_kernel_of_every_block_is_looked_at(monkeypatch):
    asked = []
    cells = "mlstm", "slstm", "lstm"
    around = "conv", "norm", "gated_activation", "loss", "qkv_and_gates", "norm_gated_skip"
    for name in (*cells, *around):
        checks = f"check_{name}"
        look = functools.partial(lambda name, **options: asked.append((name, options)) or [], name)
        monkeypatch.setattr(compared, checks, look)
    small = SMALL | {"model__ssm_state_dim": 8, "model__ssm_head_dim": 4, "model__round_up_to": 16}
    small |= {"data__micro_batch": 2, "data__seq_len": 32, "layout__tensor": 2}
    kernel_check.kernel_problems(config(**small), CPU)
    assert {o["tokens"] for n, o in asked if n in around} == {64}
    assert {(o["rows"], o["heads"]) for n, o in asked if n == "slstm"} == {(2, 1)}
    assert {(o["rows"], o["length"]) for n, o in asked if n == "mlstm"} == {(2, 32)}
    widths = {name: {o.get("width") for n, o in asked if n == name} for name, _ in asked}
    assert set(widths) == {*cells, *around}
    sizes = [(o["qk_dim"], o["v_dim"], o["gate"]) for n, o in asked if n == "mlstm"]
    assert sizes == [(8, 16, "exp"), (8, 4, "sigmoid"), (32, 32, "exp")]
    channels = [o["channels"] for n, o in asked if n == "conv"]
    assert channels == [16, 32, 32 + 8]
    forms = "gated", "summed", "beside"
    norms = [
        (o["width"], o.get("heads", 1), *(key for key in forms if o.get(key)))
        for n, o in asked
        if n == "norm"
    ]
    assert norms == [(32, 1), (32, 1, "beside"), (32, 1, "summed"), (16, 1), (16, 1, "gated")]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_check_runs_the_very_kernels_that_a_training_step_runs(warm_python):
    done = subprocess.run(
        [warm_python.executable, "-m", "tests.pretrain.guard.launches"],
        cwd=Path(__file__).parents[3],
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 runs, 0 kernels that the check leaves out" in done.stdout


def test_the_persistent_slstm_is_compared_where_the_run_asks_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr(compared, "check_slstm", lambda **o: asked.append(o["backend"]) or [])
    persistent = {"memory__slstm_form": "persistent", "engine__precision": "bf16"}
    for changes in ({}, persistent):
        kernel_check.kernel_problems(
            config(**SMALL | {"model__pattern": "s", "model__kernel_backend": None} | changes), CPU
        )
    assert asked == [None, None, "persistent"]


def test_once_looks_again_after_a_change_alone(cache, monkeypatch):
    looked = []
    monkeypatch.setattr(kernel_check, "kernel_problems", lambda *_: looked.append(1) or [])
    check_kernels_once(config(**SMALL), DEVICE)
    check_kernels_once(config(**SMALL, run__steps=7), DEVICE)
    assert len(looked) == 1
    check_kernels_once(config(**SMALL, guard__kernel_check="always"), DEVICE)
    assert len(looked) == 2
    monkeypatch.setattr(kernel_check, "driver", lambda: "another")
    check_kernels_once(config(**SMALL), DEVICE)
    check_kernels_once(config(**SMALL, model__chunk_size=8), DEVICE)
    check_kernels_once(config(**SMALL, memory__cell_states="bf16"), DEVICE)
    assert len(looked) == 5
    for another in ({"data__seq_len": 128}, {"data__micro_batch": 2}, {"layout__context": 2}):
        check_kernels_once(config(**SMALL | another), DEVICE)
    assert len(looked) == 8
    monkeypatch.setattr(kernel_check, "_hash_of_sources", lambda folder: "another")
    check_kernels_once(config(**SMALL), DEVICE)
    assert len(looked) == 9


def test_the_states_of_cells_are_kept_as_in_the_run(monkeypatch):
    asked = set()

    def seen(*inputs, states_dtype, **options):
        asked.add(states_dtype)
        return mlstm_chunkwise(*inputs, **options)

    monkeypatch.setattr(self_check, "mlstm_chunkwise", seen)
    kernel_check.kernel_problems(config(**SMALL, memory__cell_states="bf16"), CPU)
    assert asked == {torch.bfloat16}


def test_memory_of_the_comparison_is_given_back_and_no_peak_of_the_run(monkeypatch):
    done = []
    monkeypatch.setattr(kernel_check, "kernel_problems", lambda *_: done.append("compared") or [])
    monkeypatch.setattr(kernel_check, "_facts", lambda _: {})
    monkeypatch.setattr(hardware, "without_cuda", lambda: False)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, functools.partial(done.append, name))
    check_kernels_once(config(**SMALL), DEVICE)
    assert done == ["compared", "empty_cache", "reset_peak_memory_stats"]


def test_a_result_that_cannot_be_noted_is_no_error(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(kernel_check, "kernel_problems", lambda *_: [])
    check_kernels_once(config(**SMALL), DEVICE)
