"""The commands of this folder at a size that takes seconds."""

import re
import signal
import time

import pytest

from tests.data_prep.small_corpus import make_shards
from tests.long_runs import precision, resources, soak
from tests.long_runs.resources import Held

pytestmark = pytest.mark.dist


def test_a_run_that_dies_and_one_that_moves_end_as_the_one_left_alone(
    warm_python, tmp_path, capsys
):
    # Stopped at once: everything goes on where it was.
    with pytest.raises(soak.OutOfTime):
        soak.soak(warm_python, tmp_path, 16, 1, 1, time.monotonic())
    assert soak.soak(warm_python, tmp_path, 16, 1, 1)
    told = capsys.readouterr().out
    assert "are the same" in told and "NOT" not in told
    assert "left alone: 16 steps in 2 lives" in told
    assert "stopped and killed: 16 steps in 2 lives" in told
    assert "on other layouts: 16 steps in 2 lives, 1 stop and 0 kills" in told
    assert re.search(r"at most \S+ nat apart, and \S+ by another order of sums", told)


def test_deaths_are_drawn_in_their_order_and_of_every_kind():
    both = (signal.SIGTERM, signal.SIGKILL)
    deaths = soak.draw_deaths(30, 20_000, 1, both)
    steps = [death.step for death in deaths]
    assert len(deaths) == 30 and steps == sorted(steps) and steps[-1] < 20_000
    assert {death.signal for death in deaths} == set(both)
    assert {death.rank for death in deaths} == {None, 0, 1}
    assert deaths == soak.draw_deaths(30, 20_000, 1, both)


def test_growth_is_noticed_and_a_passing_thread_is_not():
    flat = [(step, Held(10_000, 9, 12 + (step % 7 == 0))) for step in range(100)]
    assert resources.growth(flat, 20).is_flat
    for held in (Held(10_200, 9, 12), Held(10_000, 10, 12), Held(10_000, 9, 13)):
        grown = [*flat[:60], *((step, held) for step in range(60, 100))]
        assert not resources.growth(grown, 20).is_flat
    assert resources.growth(flat[:24], 20) is None


def test_bf16_stands_beside_fp32(warm_python, tmp_path, capsys):
    sizes = precision.Sizes(steps=10, hidden=32, batch=4)
    python, shards = str(warm_python.executable), make_shards(tmp_path)
    work = tmp_path / "work"
    found = precision.compare(shards, work, ["M"], ["adamw"], sizes, python=python)
    shares = found["M with adamw"]
    assert all(abs(share) < precision.GOAL for share in shares.values())
    # The control differs in the last bits of fp32 alone, and the others by what they say.
    assert abs(shares["fp32 control"]) < min(abs(shares["bf16"]), abs(shares["fp32 up"]))
    assert shares["bf16"] != shares["bf16 states"]
    told = capsys.readouterr().out
    assert "largest difference: fp32 control 0.000 from fp32, " in told
    assert ", bf16 0.00" in told
    rows = [line.split() for line in told.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows[:5]] == ["2", "4", "6", "8", "10"]
    assert {row[1] for row in rows[10:]} == {*precision.GATES}
    # A finished run is read, not repeated.
    assert precision.compare(shards, work, ["M"], ["adamw"], sizes, python="/nowhere") == found
    some = precision.compare(
        shards, work, ["M"], ["adamw"], sizes, ("fp32", "bf16"), python="/nowhere"
    )
    assert some == {"M with adamw": {"bf16": shares["bf16"]}}


def test_a_run_is_named_with_the_one_that_it_is_compared_with(tmp_path, capsys):
    with pytest.raises(SystemExit):
        precision.main([str(tmp_path), "--work", str(tmp_path), "--variants", "bf16"])
    assert "'bf16' is compared with 'fp32': name it in --variants too" in capsys.readouterr().err
