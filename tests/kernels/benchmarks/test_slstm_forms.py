"""The bound of the sLSTM's time loop by form: what is counted, on plans without a GPU."""

from types import SimpleNamespace

import pytest

from benchmarks import block_roofline, slstm_forms
from benchmarks.block_roofline import Pass
from benchmarks.counting.counted_ops import Kernel
from benchmarks.counting.device_limits import BANDWIDTH

FLOORS = [SimpleNamespace(floor_us=us, ctas_per_sm=1) for us in (3.0, 2.0)]
TOGETHER = [SimpleNamespace(floor_us=us) for us in (1.0, 0.5)]


def loop(rows, d=512, steps=2048):
    return slstm_forms.loop_of(FLOORS, TOGETHER, rows, steps, 4, d)


def test_steps_floors_and_replays_are_counted():
    one = loop(4)
    # A launch more for the first state's gradient, and one for each of the 16 graphs backward.
    backward = 2048 + 1 + 16
    assert (one.launches, one.replays) == (2048 + backward, 32)
    assert one.floor_us == 2048 * 3.0 + backward * 2.0


def test_copies_into_and_out_of_graphs_are_counted():
    tokens, width = 4 * 2048, 2048
    weight, states = 2 * 4 * 4 * 512 * 512, 4 * 4 * width  # bf16; fp32 of 4 rows
    forward = 2 * tokens * 4 * width + tokens + 2 * tokens * 5 * width + 4 * tokens * 3 * width
    forward += weight + 2 * 4 * width + 2 * 5 * states  # h has two parts
    backward = 2 * tokens * 5 * width + 4 * tokens * 3 * width + tokens + 2 * tokens * 4 * width
    backward += weight + 2 * 3 * states
    assert loop(4).copied == 2 * (forward + backward)


def test_forms_differ_by_what_starts_a_step():
    one = loop(4)
    assert one.ms("launches") == pytest.approx(one.launches * 0.040 + one.rest_ms)
    graphs = (one.floor_us + 1.3 * one.launches + 10 * one.replays) / 1e3
    assert one.ms("graphs") == pytest.approx(graphs + 1e3 * one.copied / BANDWIDTH + one.rest_ms)
    assert one.ms("persistent") == pytest.approx(2048 * (1.0 + 0.5 + 2 * 1.2) / 1e3 + one.rest_ms)
    with pytest.raises(ValueError, match="not known; use one of launches, graphs, persistent"):
        one.ms("other")


def test_the_persistent_form_ends_where_programs_outnumber_processors():
    assert loop(32).together_us is not None and loop(33).together_us is None
    no_kernels = slstm_forms.loop_of(FLOORS, [], 4, 2048, 4, 512)
    assert no_kernels.together_us is None


def test_programs_that_do_not_run_at_once_take_turns():
    """64 programs for 16 rows on 132 processors, one at a time on each."""
    assert loop(16).floor_us == loop(32).floor_us == loop(33).floor_us / 2


def test_a_head_in_one_program_has_no_other_form():
    with pytest.raises(ValueError, match="heads of 192 take one launch"):
        loop(4, d=192)


def test_the_command_compares_the_two_models(monkeypatch, capsys):
    """An m block of 1 ms beside an s block of 1 ms and its loop, 42 of 48 blocks being m."""
    operator = Kernel("xlstm_kernels::slstm_scan_triton", 0)
    byte_count = round(BANDWIDTH / 1e3)

    def count_model(config):
        letters = config.model.pattern
        return Pass([Kernel("x", byte_count)] * len(letters) + [operator] * letters.count("s"))

    monkeypatch.setattr(block_roofline, "count_model", count_model)

    def examine(one, target):
        return (TOGETHER if one.cooperative else FLOORS)["bw" in one.name]

    monkeypatch.setattr(slstm_forms, "examine", examine)
    slstm_forms.main(["--rows", "4"])
    printed = capsys.readouterr().out
    assert "an m block 1.00 ms, an s block without its loop 1.00 ms; [1:0] 48 ms" in printed
    expected = 48 + 6 * loop(4).ms("graphs")
    assert f"[7:1] {expected:6.0f} ms, {expected / 48:.2f} x [1:0] (goal 1.35: MISSED)" in printed
    assert "bounds on an H100, not times" in printed and "40 us of the host" in printed
    expected = 48 + 6 * loop(4).ms("persistent")
    assert f"[7:1] {expected:6.0f} ms, {expected / 48:.2f} x [1:0] (goal 1.25" in printed
