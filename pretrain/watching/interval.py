"""What is reported of the steps between two log lines: losses, speed, waiting, memory."""

import time

from pretrain.config import RunConfig
from pretrain.engines.verdict import StepResult
from pretrain.layout import Layout
from pretrain.resume import TrainState
from xlstm_mcore import hardware
from xlstm_mcore.sizes.flops import peak_tflops, training_flops


class Interval:
    """Counts the steps since the last log line, on one rank.

    The mean loss is not counted here but in the run's state, so that a resumed run logs what the
    undisturbed one does.

    Args:
        config: the run.
        layout: where this process stands.
    """

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self._ramp, self._seq_len = config.data.ramp, config.data.seq_len
        self._steps = config.run.steps
        self._efficiency = Efficiency(config, layout)
        self._start_anew()

    def _start_anew(self) -> None:
        self._count = self._tokens = 0
        self._seconds = self._data_wait = 0.0

    def add(self, step: int, seconds: float, data_wait: float) -> None:
        """Count one step.

        Args:
            step: its number, from 0.
            seconds: how long it took, its batch included.
            data_wait: how much of that this rank waited for its batch.
        """
        self._count += 1
        self._tokens += self._ramp.size(step) * self._seq_len
        self._seconds += seconds
        self._data_wait += data_wait

    def take(self, state: TrainState, result: StepResult, lr: float) -> dict[str, float | int]:
        """The record of the interval that ends now; the next one begins.

        `loss` is the mean over the interval's applied steps, weighted by tokens, or that of the
        last step where none was applied. `loss/NAME` is the same of one source, where several are
        told apart and the interval has tokens of it. `lr` and `grad_norm` are those of the last
        step. `skipped` counts the run's steps without an update. Speeds are those of the whole run,
        waiting and memory those of this rank.

        Args:
            state: where the run stands after the interval's last step.
            result: of that step.
            lr: of that step.
        """
        speed = self._tokens / max(self._seconds, 1e-9)
        count = max(self._count, 1)
        sources = {
            f"loss/{name}": total / tokens
            for name, (total, tokens) in state.interval_sources.items()
            if tokens
        }
        record = {
            "time": round(time.time(), 3),
            "tokens": state.tokens,
            "loss": state.interval_loss if state.interval_tokens else result.loss,
            **sources,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "skipped": state.step - state.updates,
            "tokens_per_second": speed,
            **self._efficiency.of(speed),
            "step_seconds": self._seconds / count,
            "data_wait_seconds": self._data_wait / count,
            "eta_seconds": (self._steps - state.step) * self._seconds / count,
            "memory_bytes": hardware.memory_bytes(),
            "peak_memory_bytes": hardware.peak_memory_bytes(),
        }
        self._start_anew()
        return record


class Efficiency:
    """What a speed means per process: model TFLOP/s, and their share of the device's peak.

    Args:
        config: the run.
        layout: where this process stands.
    """

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self._tflop_per_token = (
            training_flops(config.model, config.data.seq_len) / 1e12 / layout.world_size
        )
        self._peak = config.logging.peak_tflops
        if self._peak is None and config.engine.precision == "bf16":
            self._peak = peak_tflops(hardware.device_name())

    def of(self, tokens_per_second: float) -> dict[str, float]:
        """`tflops` per process, and `mfu` where the device's peak is known."""
        tflops = tokens_per_second * self._tflop_per_token
        return {"tflops": tflops} | ({"mfu": tflops / self._peak} if self._peak else {})
