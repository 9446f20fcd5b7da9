"""Which checkpoints count when several lives of a run wrote into one folder.

A run may be started again while an older life of it only stands still (a stopped process, a cut
network). The newer life records the step from which it went on. A checkpoint of an older life
beyond that step was written by a life that had already been superseded: it belongs to a branch of
the run that nobody continues, and loading it would throw away the newer life's work. It is named
and never loaded.

    CHECKPOINTS/lives/000003.json    {"start_step": 200}

The number of the life that wrote a checkpoint is in its manifest (`state.life`); checkpoints from
before there were lives count as those of life 0.
"""

import json
import re

from xlstm_io.errors import CheckpointDamagedError
from xlstm_io.storage import Location, files, is_folder, read_file, write_atomic

LIVES_FOLDER = "lives"
_RECORD = re.compile(r"(\d{6,})\.json")
_LIMIT = 4096  # bytes of a record


def record_start(checkpoints: Location, life: int, start_step: int) -> None:
    """Note in the folder of a run's checkpoints the step from which a life goes on."""
    path = checkpoints / LIVES_FOLDER / f"{life:06d}.json"
    write_atomic(path, json.dumps({"start_step": start_step}).encode())


class Lives:
    """The lives that wrote into a folder of checkpoints.

    Args:
        checkpoints: the folder that holds the step folders.

    Raises:
        OSError: the folder cannot be read.
    """

    def __init__(self, checkpoints: Location) -> None:
        self._folder = checkpoints / LIVES_FOLDER
        names = files(self._folder) if is_folder(self._folder) else {}
        self._lives = sorted(int(m[1]) for name in names if (m := _RECORD.fullmatch(name)))
        self._starts: dict[int, int] = {}

    def superseded_by(self, life: int, step: int) -> int | None:
        """The later life that went on from an earlier step than a checkpoint's; None if none did.

        Args:
            life: the life that wrote the checkpoint.
            step: of the checkpoint.

        Raises:
            CheckpointDamagedError: a record is not what was written.
        """
        later = (other for other in self._lives if other > life)
        return next((other for other in later if self._start(other) < step), None)

    def _start(self, life: int) -> int:
        if life not in self._starts:
            path = self._folder / f"{life:06d}.json"
            try:
                self._starts[life] = int(json.loads(read_file(path, _LIMIT))["start_step"])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointDamagedError(
                    f"{path} does not say where life {life} began"
                ) from error
        return self._starts[life]
