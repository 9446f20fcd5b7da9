"""The one command for a GPU run works, as far as a CPU can show; and it sees what is wrong."""

import json
import os
import select
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_proof import __main__ as proof
from benchmarks.gpu_proof import correctness, machine, slstm, times
from benchmarks.gpu_proof.setting import Setting

ROOT = Path(__file__).parents[3]


def test_the_dry_run_finishes_every_part(warm_python, tmp_path):
    done = subprocess.run(
        [
            warm_python.executable, "-m", "benchmarks.gpu_proof", "--out", str(tmp_path),
            "--dry-run", "--budget", "1000",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    logs = "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in tmp_path.glob("*.log"))
    bad = [line for line in done.stdout.splitlines() if "WRONG" in line or "FAILED" in line]
    assert done.returncode == 0, "\n".join([*bad, done.stderr, logs])
    rows = json.loads((tmp_path / "proof.json").read_text())["rows"]
    assert {row["part"] for row in rows} == set(proof.PARTS)
    assert any("ms_32_blocks" in row for row in rows)
    assert (tmp_path / "step.json.gz").stat().st_size > 0
    assert len(done.stdout.splitlines()) < 150


def test_a_wrong_kernel_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(
        correctness, "gated_activation", lambda x, kind, backend: x[..., : x.shape[-1] // 2] * 1.05
        if x.dtype != torch.float64 else x[..., : x.shape[-1] // 2],
    )  # fmt: skip
    setting = Setting(tmp_path, True)
    inputs = correctness._swiglu_inputs(setting, torch.float32)
    found = correctness.check(setting, correctness._swiglu, inputs, 1e-4)
    assert not found["ok"] and found["worst"] == pytest.approx(0.05, rel=0.1)


def test_a_part_that_fails_does_not_stop_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(proof, "PARTS", {"machine": 1, "sanitizer": 1})

    def run(seconds, words, log):
        if "machine" in words:
            return "exit code 1"
        proof.run_part("sanitizer", Setting(tmp_path, True))

    monkeypatch.setattr(proof, "run_within", run)
    rows = proof.run_all(Setting(tmp_path, True), 2.0)
    assert rows[0]["failure"] == "exit code 1"
    assert rows[1]["left_out"] and "failure" not in rows[2]
    assert "FAILED" in proof.describe(rows[0])


def test_a_part_that_takes_too_long_ends_with_all_that_it_started():
    read, write = os.pipe()
    with os.fdopen(write, "w") as log:
        found = proof.run_within(0.5, ["sh", "-c", "sleep 100 & wait"], log)
    assert "not finished" in found
    assert select.select([read], [], [], 30)[0], "somebody is left who could write"
    os.close(read)


@pytest.mark.parametrize("part", [machine, times, slstm])
def test_rows_can_be_written_and_described(part, tmp_path):
    for row in part.rows(Setting(tmp_path, True)):
        proof.describe({"part": "part", **json.loads(json.dumps(row))})


def test_nothing_is_copied_from_the_host_while_the_mlstm_is_timed(monkeypatch, tmp_path):
    timed = []

    def alone(function, inputs, device):
        with monkeypatch.context() as patch:
            patch.setattr(times, "documents", None)
            function(*inputs)
        timed.append(function)
        return {}

    monkeypatch.setattr(times.kernels_gpu, "time_call", alone)
    found = list(times.rows(Setting(tmp_path, True)))
    assert len(timed) == len(found), [row for row in found if "left_out" in row]


def test_without_a_gpu_it_says_so(capsys):
    assert proof.main(["--out", "unused"]) == 0
    assert "no GPU here" in capsys.readouterr().out
