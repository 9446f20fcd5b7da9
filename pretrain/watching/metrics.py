"""What a run records while it trains: `metrics.jsonl`, and what other writers take of it.

`metrics.jsonl` is the record: one JSON object per logged step, `step` being the number of finished
steps, flushed line by line, each step once. A run that resumes at step N drops what an earlier
process logged beyond N, because those steps are computed again. Only one rank writes; the others
hold a logger with `enabled=False`.

It is a log and not a state: no run ends because of what somebody wrote into it, and a line that
cannot be read is left out. Where it cannot be written, the run saves first and stops then.
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pretrain.run_folder import CELLS_FILE, METRICS_FILE
from pretrain.watching.metric_writers import MetricWriter
from pretrain.watching.progress import Progress
from xlstm_io.errors import ConfigError
from xlstm_io.storage import write_atomic


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`, in order.

    What is not a record is left out: a line that a crash has torn, a damaged one, a foreign one.
    """
    records = []
    with open(path, "rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # not UTF-8, or not JSON
                continue
            if isinstance(record, dict) and type(record.get("step")) is int:
                records.append(record)
    return records


def _drop_after(path: Path, step: int) -> dict[str, Any]:
    """Keep the records up to `step` finished steps; the last one of them."""
    if not path.exists() and not path.is_symlink():
        return {}
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; move it away")
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_atomic(path, "".join(_line(record) for record in kept).encode())
    return kept[-1] if kept else {}


def _line(record: Mapping[str, Any]) -> str:
    """One record as a line of JSON; nan and inf, which JSON cannot express, become null."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(clean, allow_nan=False) + "\n"


class MetricLogger:
    """Records metrics and shows progress; use as a context manager.

    Args:
        run_dir: the run's folder.
        total_steps: steps of the whole run, for the progress bar.
        start_step: finished steps this process starts from; records beyond it are dropped.
        writers: what else takes the numbers; closed with the logger.
        enabled: False makes every method do nothing (all ranks but one).
        stream: where progress goes; None for stderr.

    Attributes:
        fault: why a record could not be written; None as long as all were. Nothing more is written
            then: the run saves and ends, as its checkpoints may lie on another disk.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        *,
        total_steps: int,
        start_step: int = 0,
        writers: Sequence[MetricWriter] = (),
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self._enabled = enabled
        self.fault: OSError | None = None
        if not enabled:
            return
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = path = folder / METRICS_FILE
        # An evaluation that an earlier process did not finish adds to the record of its step.
        self._last = _drop_after(path, start_step)
        self._cells = folder / CELLS_FILE
        _drop_after(self._cells, start_step)
        self._file = open(path, "a", encoding="utf-8")
        last = len(_line(self._last).encode()) if self._last else 0
        self._last_offset = path.stat().st_size - last
        self._writers = writers
        self._progress = Progress(total_steps, start_step, stream)

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def advance(self, step: int) -> None:
        """Tell that `step` steps are finished; moves the bar, records nothing."""
        if self._enabled:
            self._progress.advance(step)

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Record metrics. A second call for the same step adds to that step's record.

        Args:
            step: number of finished steps.
            values: plain numbers (no tensors), such as `tokens`, `loss` and `lr`.
        """
        if not self._enabled or self.fault is not None:
            return
        with self._noting_fault():
            self._write(step, values)
            for writer in self._writers:
                writer.write(step, values)
            self._progress.show(step, values)

    @contextmanager
    def _noting_fault(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.fault = error
            self._progress.message(f"{error}: the run saves and stops")

    def _write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Put a record at the end of the file, in the place of the last one if it is its step.

        Raises:
            OSError: that is not possible, or nobody would find it.
        """
        if not self._is_there():
            raise FileNotFoundError(
                errno.ENOENT, "removed or replaced while the run was at work", str(self._path)
            )
        if self._last.get("step") == step:
            self._file.truncate(self._last_offset)
            self._last = {**self._last, **values}
        else:
            self._last = {"step": step, **values}
        self._file.seek(0, os.SEEK_END)
        self._last_offset = self._file.tell()
        self._file.write(_line(self._last))
        self._file.flush()

    def _is_there(self) -> bool:
        """Whether the path still names the file that is open here."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def log_cells(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Record a look into the layers, apart from the metrics; see `pretrain.watching.cells`.

        Other writers get each figure as `cells/LAYER/NAME`.
        """
        if not self._enabled or not lines or self.fault is not None:
            return
        values = {}
        for line in lines:
            layer = line["layer"]
            place = f"cells/{layer:02d}" if isinstance(layer, int) else f"cells/{layer}"
            values |= {f"{place}/{k}": v for k, v in line.items() if isinstance(v, float)}
        with self._noting_fault():
            with open(self._cells, "a", encoding="utf-8") as file:
                file.write("".join(map(_line, lines)))
            for writer in self._writers:
                writer.write(lines[0]["step"], values)

    def evaluating(self, done: int, total: int) -> None:
        """Show that an evaluation has done so many of its batches; records nothing."""
        if self._enabled:
            self._progress.evaluating(done, total)

    def message(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._enabled:
            self._progress.message(text)

    def close(self) -> None:
        """Finish the files and the bar; further calls do nothing."""
        if not self._enabled:
            return
        self._enabled = False
        self._progress.close()
        for writer in self._writers:
            writer.close()
        try:
            self._file.close()
        except OSError as error:  # what a full disk did not take is still to be written
            self.fault = self.fault or error
