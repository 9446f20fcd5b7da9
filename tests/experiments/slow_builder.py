"""Stands for a command that builds data: works until it is stopped, and is quick the second time.

    python -m tests.experiments.slow_builder --out SHARDS NOTES

`NOTES` is a folder for what it has to say to the test; it makes no shards.
"""

import signal
import sys
import time
from pathlib import Path

from xlstm_io.errors import ExitCode, Interrupted
from xlstm_io.signals import stop_signals_raise


def main() -> int:
    """Returns 75 when it was asked to stop, as the commands of `data_prep` do."""
    folder = Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "stopped").exists():
        return ExitCode.DONE
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a test sends that to its parent alone
    try:
        with stop_signals_raise():
            (folder / "at-work").touch()
            time.sleep(60)
    except Interrupted:
        (folder / "stopped").touch()
        return ExitCode.STOPPED
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
