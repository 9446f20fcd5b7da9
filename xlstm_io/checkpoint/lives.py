"""Which checkpoints count when several lives of a run wrote into one folder.

A run may be started again while an older life of it only stands still (a stopped process, a cut
network). The newer life records the step from which it went on. A checkpoint of an older life
beyond that step was written by a life that had already been superseded: it belongs to a branch of
the run that nobody continues, and loading it would throw away the newer life's work. It is named
and never loaded.

    CHECKPOINTS/lives/000003.json    {"start_step": 200}

The record is never replaced. Where the checkpoints do not lie in the run folder, it also names that
folder (`"run"`), since there may be others that write here. Then, too, the highest number is right.

A person may also take a run back to a checkpoint (`python -m pretrain rewind`). That counts as a
life which begins there, and its record says how many of the next samples are left out:

    CHECKPOINTS/lives/000004.json    {"start_step": 120, "skip_samples": 4096}

The number of the life that wrote a checkpoint is in its manifest (`state.life`); checkpoints from
before there were lives count as those of life 0.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from xlstm_io.errors import CheckpointError, Superseded
from xlstm_io.foreign.json_file import StrictModel, parse_json
from xlstm_io.new_file import create_new
from xlstm_io.storage import Location, absolute, files, is_folder, read_file

#: The folder of a run that holds its checkpoints.
CHECKPOINTS_FOLDER = "checkpoints"
LIVES_FOLDER = "lives"
_RECORD = re.compile(r"(\d{6,})\.json")
_LIMIT = 4096  # bytes of a record


def record_start(
    checkpoints: Location,
    life: int,
    start_step: int,
    skip_samples: int | None = None,
    *,
    run: Path | None = None,
) -> None:
    """Note in the folder of a run's checkpoints the step from which a life goes on.

    Args:
        checkpoints: the folder that holds the step folders.
        life: its number.
        start_step: finished steps when it begins.
        skip_samples: samples that are left out from there on; None for a life that is not a rewind.
        run: the run folder; None where the checkpoints lie in it.

    Raises:
        CheckpointError: another run folder has begun a life of that number here.
        OSError: the folder cannot be written.
    """
    record: dict[str, int | str] = {"start_step": start_step}
    if skip_samples is not None:
        record["skip_samples"] = skip_samples
    if run is not None:
        record["run"] = str(absolute(run))
    path = checkpoints / LIVES_FOLDER / f"{life:06d}.json"
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        create_new(path, json.dumps(record).encode())
    except FileExistsError:
        raise CheckpointError(
            f"{path} is there already: a life with another run folder began at this very moment; "
            "use a checkpoint.dir of its own for each run.dir"
        ) from None


def check_newest(checkpoints: Location, life: int) -> None:
    """Nothing while no newer life is noted among the checkpoints, whatever its run folder.

    Raises:
        Superseded: there is one.
        OSError: the folder cannot be read.
    """
    lives = Lives(checkpoints)
    if lives.newest > life:
        whose = "of another run folder" if lives.run is None else f"of run.dir={lives.run}"
        raise Superseded(
            f"life {lives.newest} {whose} has taken over {checkpoints} from life {life}, which "
            "ends here and deletes nothing"
        )


class _Record(StrictModel):
    """Where a life began; other keys are those of another version."""

    model_config = ConfigDict(extra="ignore")

    start_step: Annotated[int, Field(ge=0, lt=1 << 62)]
    skip_samples: Annotated[int, Field(ge=0, lt=1 << 62)] | None = None
    run: str | None = None


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
        self._records: dict[int, _Record] = {}

    @property
    def newest(self) -> int:
        """Number of the newest life; 0 when there was none."""
        return self._lives[-1] if self._lives else 0

    @property
    def run(self) -> Path | None:
        """The run folder of the newest life, where its record names one and is not damaged.

        Raises:
            OSError: the record cannot be read.
        """
        with suppress(CheckpointError):  # named by whoever looks for a checkpoint
            named = self._record(self.newest).run if self.newest else None
            return None if named is None else Path(named)
        return None

    def superseded_by(self, life: int, step: int) -> int | None:
        """The later life that went on from an earlier step than a checkpoint's; None if none did.

        Args:
            life: the life that wrote the checkpoint.
            step: of the checkpoint.

        Raises:
            CheckpointError: the record of a life is damaged. It says nothing about the checkpoint.
            OSError: a record cannot be read.
        """
        later = (other for other in self._lives if other > life)
        return next((other for other in later if self._record(other).start_step < step), None)

    def samples_to_skip(self, life: int, step: int) -> int:
        """How many samples a run that goes on from a checkpoint leaves out before the next one.

        Args:
            life: the life that wrote the checkpoint.
            step: of the checkpoint.

        Raises:
            CheckpointError: the record of a life is damaged.
            OSError: a record cannot be read.
        """
        later = (self._record(other) for other in reversed(self._lives) if other > life)
        rewinds = (r.skip_samples for r in later if r.start_step == step)
        return next((number for number in rewinds if number is not None), 0)

    def _record(self, life: int) -> _Record:
        if life not in self._records:
            path = self._folder / f"{life:06d}.json"
            try:
                self._records[life] = _Record.model_validate(parse_json(read_file(path, _LIMIT)))
            except ValueError as error:
                raise CheckpointError(
                    f"{path} is damaged and does not say where life {life} began: write "
                    '{"start_step": STEP} into it, with the step that history.jsonl in the run '
                    'folder names for the start of that life; for a rewind add "skip_samples"'
                ) from error
        return self._records[life]
