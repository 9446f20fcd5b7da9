"""`python -m pretrain` with steps of a fifth of a second, so that a fault can meet one.

The loop asks once per step whether it has to stop: that is where it waits. Everything else is the
product, the order of its imports and its signals included.
"""

import sys
import time

from pretrain import cli

STEP_S = 0.2


class SlowStop(cli.StopSignal):
    """A request to stop that takes its time to say no."""

    @property
    def requested(self):
        if not super().requested:
            time.sleep(STEP_S)
        return super().requested


cli.StopSignal = SlowStop
sys.exit(cli.run(sys.argv[1:]))
