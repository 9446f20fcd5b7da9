"""A life stops early enough to save before its job ends.

A scheduler's signal comes at a time that was set before the run had saved anything. What a save
takes is known after the first one, so a life sees to that itself where it is told when its job
ends, in `XLSTM_JOB_END`, as seconds since 1970.
"""

import math
import os

from xlstm_io.signals import StopSignal

VARIABLE = "XLSTM_JOB_END"
MARGIN_S = 60


def seconds_to_stop(save_s: float, step_s: float) -> int:
    """Seconds before its end at which a run has to be asked to stop.

    A save may be under way, and the last one begins when it and a step are done.

    Args:
        save_s: seconds of a save.
        step_s: seconds of a step.
    """
    return math.ceil(2 * (save_s + step_s)) + MARGIN_S


def stop_in_time(stop: StopSignal, save_s: float | None, step_s: float | None) -> None:
    """Request a stop early enough for a save; nothing where the end of the job is not told.

    Args:
        stop: the request to stop.
        save_s: seconds of the last save; None before the first.
        step_s: seconds of the last step; None before the first.
    """
    end = os.environ.get(VARIABLE)
    if end and save_s is not None:
        stop.end_at(float(end) - seconds_to_stop(save_s, step_s or 0.0))
