"""The benchmark of the loop around the model: it runs, and its table is what it says."""

import sys

import pytest

from benchmarks import trainer_overhead


def test_a_part_counts_as_often_as_it_happens():
    ordinary = {"forward_backward": 0.7, "optimizer": 0.2, "loader": 0.04, "step": 1.0}
    steps = [{"step": 99.0}] * trainer_overhead.WARM_UP
    steps += [ordinary, ordinary | {"logging": 0.02}] * 2
    steps += [ordinary | {"checkpoint stall": 5.0, "step": 6.0}]
    steps += [ordinary | {trainer_overhead.CHECK: 2.0, "step": 3.0}]
    intervals = {"checkpoint stall": 100, trainer_overhead.CHECK: 1000}
    whole, costs = trainer_overhead.summarize(steps, intervals)
    assert whole == 1.0
    expected = {"forward_backward": 0.7, "optimizer": 0.2, "loader": 0.04, "logging": 0.01}
    expected |= {"checkpoint stall": 0.05, trainer_overhead.CHECK: 0.002, "other": 0.05}
    assert costs == pytest.approx(expected)
    assert trainer_overhead.report(whole, costs, 5).splitlines()[-2:] == [
        "check of the replicas: 0.20% of a step (goal 0.2%: met)",
        "around the model: 15.20% of a step (goal 3%: MISSED)",
    ]


def test_every_part_of_the_loop_is_measured(warm_python, monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", str(warm_python.executable))
    assert trainer_overhead.main(["--quick", "--replicas", "--steps", "12"]) == 0
    out = capfd.readouterr().out
    for part in ("forward_backward", "optimizer", "loader", "verdict", "logging", "other"):
        assert f"  {part} " in out
    for part in (
        "gradient norm",
        "checkpoint stall",
        trainer_overhead.CHECK,
        "around the model: ",
    ):
        assert part in out
