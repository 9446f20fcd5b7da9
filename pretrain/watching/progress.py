"""What a person sees of a run while it trains: a bar on a terminal, plain lines elsewhere."""

import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

BAR_WIDTH = 160
BAR_FORMAT = "step {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
EVALUATION_LINE_S = 60.0


def duration(seconds: float) -> str:
    """A time in its two largest units, such as `3 d 04 h`, `2 h 05 min` or `41 s`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d} h"
    if hours:
        return f"{hours} h {minute:02d} min"
    return f"{minutes} min {second:02d} s" if minutes else f"{second} s"


class SafeStream:
    """A stream that never fails: a run must reach its checkpoint when its terminal is closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or lose the text."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# Not in the line: what stands in it in another form, and what a message says.
_LEFT_OUT = (
    "step",
    "tokens",
    "time",
    "step_seconds",
    "memory_bytes",
    "checkpoint_stall_seconds",
)


def describe(values: Mapping[str, Any]) -> str:
    """Metrics as one short readable line: `loss 4.31  valid_loss 4.40  lr 1.0e-03 ...`."""
    words = []
    for key, value in values.items():
        if key in _LEFT_OUT or key.startswith("ranks/") or (key == "skipped" and not value):
            continue
        if key == "data_wait_seconds":
            share = value / max(values.get("step_seconds", value), 1e-9)
            if share >= 0.01:
                words.append(f"data wait {share:.0%}")
        elif key == "peak_memory_bytes":
            words.append(f"memory {value / 2**30:.2f} GiB")
        elif key == "eta_seconds":
            words.append(f"eta {duration(value)}")
        elif not isinstance(value, float):
            words.append(f"{key} {value}")
        elif key == "lr":
            words.append(f"{key} {value:.2e}")
        elif key == "tflops":
            number, unit = (value, key) if value >= 1 else (1e3 * value, "gflops")
            words.append(f"{unit} {number:.3g}")
        elif key.endswith("_per_second"):
            words.append(f"{key.removesuffix('_per_second')}/s {value:,.0f}")
        else:
            words.append(f"{key} {value:.3f}")
    return "  ".join(words)


class Progress:
    """Shows steps, metrics and messages on one stream.

    Args:
        total_steps: steps of the whole run.
        start_step: finished steps this process starts from.
        stream: where to; None for stderr. A terminal gets a bar, anything else plain lines.
    """

    def __init__(self, total_steps: int, start_step: int, stream: TextIO | None = None) -> None:
        self._total = total_steps
        self._stream = SafeStream(sys.stderr if stream is None else stream)
        self._started = self._told = time.monotonic()
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

    def advance(self, step: int) -> None:
        """Move the bar to `step` finished steps."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def evaluating(self, done: int, total: int) -> None:
        """Show how far an evaluation is: beside the bar, or in a line every `EVALUATION_LINE_S`."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"evaluating {done}/{total}", refresh=True)
            return
        now = time.monotonic()
        if done == 0:
            self._told = now
        elif now - self._told >= EVALUATION_LINE_S:
            self._told = now
            self.message(f"evaluating: {done:,} of {total:,} batches")

    def message(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def show(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step."""
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
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()
