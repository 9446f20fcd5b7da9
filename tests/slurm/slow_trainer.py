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
        time.sleep(0 if self._requested else STEP_S)
        return self._requested

    @requested.setter
    def requested(self, value):
        self._requested = value


cli.StopSignal = SlowStop
sys.exit(cli.run(sys.argv[1:]))
