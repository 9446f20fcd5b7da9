"""How fast a run trains: tokens per second, and what that is of the device's peak."""

from pretrain.config import RunConfig
from pretrain.layout import Layout
from xlstm_mcore.megatron import cpu_runtime
from xlstm_mcore.sizes.flops import peak_tflops, training_flops


class Speed:
    """Tokens per second since the last time it was asked."""

    def __init__(self) -> None:
        self._tokens, self._seconds = 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count one step."""
        self._tokens += tokens
        self._seconds += seconds

    def take(self) -> float:
        """The mean speed of the counted steps; starts counting anew."""
        speed = self._tokens / max(self._seconds, 1e-9)
        self._tokens, self._seconds = 0, 0.0
        return speed


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
            self._peak = peak_tflops(cpu_runtime.device_name())

    def of(self, tokens_per_second: float) -> dict[str, float]:
        """`tflops` per process, and `mfu` where the device's peak is known."""
        tflops = tokens_per_second * self._tflop_per_token
        return {"tflops": tflops} | ({"mfu": tflops / self._peak} if self._peak else {})
