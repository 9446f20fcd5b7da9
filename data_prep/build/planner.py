"""Of several jobs on one build one makes the plan, and the others wait for it.

    OUT/_work/plan/KEY.planner-000001     which job makes the plan KEY; written once

A plan reads the scans of all files. A thousand jobs that did so at once would ask a shared file
system for a thousand times as much. The newest planner is right. It touches its file while it
works. A job that waits becomes the next planner when this one is gone: its process is not there any
more, an earlier start of the waiting job was it, or it was silent for `STALE_S`. Nothing but time
depends on who plans, because two that plan at once come to the same plan. So no lock is needed.
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from data_prep.config import JobShare
from data_prep.jobs.progress import say
from xlstm_io.holder import Holder, time_there
from xlstm_io.new_file import create_new
from xlstm_io.storage import read_file

RENEW_S = 20.0
STALE_S = 300.0  # a file system may show a change so much later as a minute
POLL_S = 2.0
POLLS_S = 0.01  # between the questions of all jobs together
_LIMIT = 1 << 16  # bytes of a planner's file

Plan = TypeVar("Plan")


def plan_once(
    path: Path, share: JobShare, stored: Callable[[], Plan | None], make: Callable[[], Plan]
) -> Plan:
    """The plan at `path`, which one of the jobs makes.

    Args:
        path: where the plan is noted.
        share: which of the jobs this is.
        stored: the plan that is there; None while there is none.
        make: makes it, and stores it.
    """
    told = 0
    while True:
        plan = stored()
        if plan is not None:
            return plan
        if share.jobs == 1:
            return make()
        number = _newest(path)
        planner, claim = _read(path, number), _claim(path, number)
        if number and not _is_gone(claim, planner, share):
            if number != told:
                who = "another one" if planner is None else f"job {planner[0]} on {planner[1].host}"
                say(f"job {share.job} waits for the plan of the corpus, which {who} makes")
                told = number
        elif _take(_claim(path, number + 1), share):
            with _touched(_claim(path, number + 1)):
                return make()
        # A thousand jobs ask a file system a hundred times a second together.
        time.sleep(max(POLL_S, POLLS_S * share.jobs))


def _take(claim: Path, share: JobShare) -> bool:
    """Whether this job plans from now on; another one may have been faster."""
    about = {"job": share.job, "holder": asdict(Holder.here())}
    claim.parent.mkdir(parents=True, exist_ok=True)
    try:
        create_new(claim, json.dumps(about).encode())
    except FileExistsError:
        return False
    return True


def _claim(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.planner-{number:06d}")


def _newest(path: Path) -> int:
    """Number of the newest planner; 0 where there was none."""
    pattern = re.compile(re.escape(path.stem) + r"\.planner-(\d{6,})")
    names = (found.name for found in path.parent.glob("*.planner-*"))
    return max((int(match[1]) for name in names if (match := pattern.fullmatch(name))), default=0)


def _read(path: Path, number: int) -> tuple[int, Holder] | None:
    """Number and process of the job that plans; None where that cannot be read."""
    try:
        about = json.loads(read_file(_claim(path, number), _LIMIT))
        return int(about["job"]), Holder(**about["holder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_gone(claim: Path, planner: tuple[int, Holder] | None, share: JobShare) -> bool:
    """Whether nobody makes the plan any more."""
    if planner is not None:
        job, holder = planner
        here = Holder.here()
        if job == share.job or here.follows(holder):
            return True
        if here.sees(holder):
            return not holder.runs()
    try:
        return time_there(claim.parent) - claim.lstat().st_mtime > STALE_S
    except FileNotFoundError:  # given back at this moment
        return False


@contextmanager
def _touched(claim: Path) -> Iterator[None]:
    """Touch a planner's file while it plans; remove it when that fails.

    It stays beside the plan: a file system may show the plan to others when it has long shown them
    that the file is gone.
    """
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(RENEW_S):
            with suppress(OSError):
                os.utime(claim)  # unlike touch, makes no file where it was removed

    thread = threading.Thread(target=touch, name="planner", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        claim.unlink(missing_ok=True)
        raise
    finally:
        ended.set()
        thread.join()
