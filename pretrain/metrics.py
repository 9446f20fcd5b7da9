"""What a run writes down while it trains: metrics.jsonl, TensorBoard events, progress.

`metrics.jsonl` is the record: one JSON object per logged step, `step` being the number of finished
steps, flushed line by line, each step once. A run that resumes at step N drops what an earlier
life logged beyond N, in the file and (by purge_step) in TensorBoard, because those steps are
computed again. Only one rank writes; the others hold a logger with `enabled=False`.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"
BAR_WIDTH = 160
BAR_FORMAT = "step {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


class _Forgiving:
    """A stream that never fails: a run must reach its checkpoint when its terminal is closed."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl, in order; a torn last line (a crash) is left out."""
    records = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def _drop_after(path: Path, step: int) -> None:
    """Keep the records up to `step` finished steps; the file is replaced whole or not at all."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_atomic(path, "".join(_line(record) for record in kept).encode())


def _line(record: Mapping[str, Any]) -> str:
    """One record as a line of JSON; nan and inf, which JSON has no words for, become null."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(clean, allow_nan=False) + "\n"


def describe(values: Mapping[str, Any]) -> str:
    """Metrics as one short readable line: `loss 4.31  valid_loss 4.40  lr 1.0e-03 ...`."""
    words = []
    for key, value in values.items():
        if key in ("step", "tokens", "checkpoint_stall_seconds"):  # a message says the last
            continue
        if not isinstance(value, float):
            words.append(f"{key} {value}")
        elif key == "lr":
            words.append(f"{key} {value:.2e}")
        elif key == "tflops":
            words.append(f"{key} {value:.3g}")
        elif key.endswith("_per_second"):
            words.append(f"{key.removesuffix('_per_second')}/s {value:,.0f}")
        else:
            words.append(f"{key} {value:.3f}")
    return "  ".join(words)


class MetricLogger:
    """Writes metrics and shows progress; use as a context manager.

    run_dir: the run's folder. total_steps: steps of the whole run, for the progress bar.
    start_step: finished steps this process starts from; records beyond it are dropped.
    tensorboard: write events to run_dir/tensorboard too. enabled: False makes every method do
    nothing (all ranks but one). stream: where progress goes; a bar if it is a terminal, plain
    lines otherwise.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        *,
        total_steps: int,
        start_step: int = 0,
        tensorboard: bool = True,
        enabled: bool = True,
        stream: TextIO | None = None,
    ):
        self._enabled = enabled
        if not enabled:
            return
        self._total = total_steps
        self._stream = _Forgiving(sys.stderr if stream is None else stream)
        self._started = time.monotonic()
        self._start_step = start_step
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        _drop_after(path, start_step)
        self._file = open(path, "a", encoding="utf-8")
        self._last: dict[str, Any] = {}
        self._last_offset = 0
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(folder / TENSORBOARD_DIR), purge_step=start_step + 1 if start_step else None
            )
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                bar_format=BAR_FORMAT,
                ncols=min(shutil.get_terminal_size().columns, BAR_WIDTH),
            )

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def advance(self, step: int) -> None:
        """Tell that `step` steps are finished; moves the bar, writes nothing."""
        if self._enabled and self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Write one record. A second call for the same step adds to that step's record.

        step: number of finished steps. values: plain numbers (no tensors), e.g. tokens, loss, lr,
        grad_norm, tokens_per_second, valid_loss.
        """
        if not self._enabled:
            return
        if self._last.get("step") == step:
            self._file.truncate(self._last_offset)
            self._last = {**self._last, **values}
        else:
            self._last = {"step": step, **values}
        self._file.seek(0, os.SEEK_END)
        self._last_offset = self._file.tell()
        self._file.write(_line(self._last))
        self._file.flush()
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, global_step=step)
            self._writer.flush()
        self._show(step, values)

    def message(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _show(self, step: int, values: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self.advance(step)
            if "valid_loss" in values:
                self.message(f"step {step}: {describe(values)}")
            short = {k: values[k] for k in ("loss", "tokens_per_second") if k in values}
            if short:
                self._bar.set_postfix_str(describe(short), refresh=True)
            return
        text, seconds = describe(values), time.monotonic() - self._started
        if text:
            self.message(f"step {step}/{self._total}  {text}  ({seconds:.0f} s)")

    def close(self) -> None:
        """Finish the files and the bar; further calls do nothing."""
        if not self._enabled:
            return
        self._enabled = False
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
        self._file.close()
