"""Whether this Python has the project's packages. Imports nothing that could be missing."""

import sys
from importlib.util import find_spec

from xlstm_io.errors import ExitCode
from xlstm_io.terminal import tell


def check_installed() -> None:
    """End with one message and exit code 2 in a shell without the project's environment.

    In a clone any Python finds the project's own folders, and the first import of a package would
    be a traceback.
    """
    if find_spec("pydantic") is None:
        tell(
            f"error: {sys.executable} does not have the packages of this project (such as "
            "pydantic); activate the environment with `source .venv/bin/activate`, or make one "
            "with `make setup` (docs/install.md)"
        )
        raise SystemExit(ExitCode.BAD_INPUT)
