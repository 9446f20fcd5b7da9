"""Who makes the plan of a build, apart from any build."""

import json
import time
from dataclasses import asdict, replace

import pytest

from data_prep.build import planner
from data_prep.config import JobShare
from xlstm_io.errors import Interrupted
from xlstm_io.holder import Holder


@pytest.fixture
def path(tmp_path):
    """Where the plan is noted."""
    return tmp_path / "plan" / "key.json"


def test_an_error_while_planning_is_not_taken_for_a_faster_planner(path):
    """A folder was in the way of a plan, which began again and again and said nothing."""
    begun = []

    def make():
        begun.append(1)
        raise FileExistsError if len(begun) == 1 else Interrupted

    with pytest.raises(FileExistsError):
        planner.plan_once(path, JobShare(0, 2), lambda: None, make)
    assert [*path.parent.iterdir()] == []


@pytest.mark.parametrize(("jobs", "seconds"), [(2, 2.0), (1000, 10.0)])
def test_many_jobs_that_wait_ask_less_often(path, monkeypatch, jobs, seconds):
    path.parent.mkdir()
    holder = asdict(replace(Holder.here(), host="elsewhere"))
    claim = path.with_name("key.planner-000001")
    claim.write_text(json.dumps({"job": 0, "holder": holder}))
    waited, plans = [], iter([None, None, "the plan"])
    monkeypatch.setattr(planner.time, "sleep", waited.append)
    share = JobShare(1, jobs)
    assert planner.plan_once(path, share, lambda: next(plans), lambda: "mine") == "the plan"
    assert waited == [seconds] * 2


def test_a_job_that_another_one_forestalls_waits(path, monkeypatch):
    """What a network file system refuses it may show a minute later."""
    waited, plans = [], iter([None, "the plan"])

    def refuse(claim, data):
        raise FileExistsError

    monkeypatch.setattr(planner, "create_new", refuse)
    monkeypatch.setattr(planner.time, "sleep", waited.append)
    share = JobShare(1, 2)
    assert planner.plan_once(path, share, lambda: next(plans), lambda: "mine") == "the plan"
    assert waited == [2.0]


def test_a_planners_file_that_was_removed_does_not_come_back(tmp_path, monkeypatch):
    """It would be empty, and hold the others up for five minutes."""
    monkeypatch.setattr(planner, "RENEW_S", 0.01)
    claim = tmp_path / "key.planner-000001"
    with planner._touched(claim):
        time.sleep(0.1)
    assert not claim.exists()


def test_a_link_to_nothing_in_place_of_a_planners_file_holds_nobody_up(path, monkeypatch):
    path.parent.mkdir()
    path.with_name("key.planner-000001").symlink_to("nowhere")
    monkeypatch.setattr(planner, "time_there", lambda folder: time.time() + 301)
    monkeypatch.setattr(planner.time, "sleep", lambda seconds: pytest.fail("it waits"))
    assert planner.plan_once(path, JobShare(1, 2), lambda: None, lambda: "mine") == "mine"
