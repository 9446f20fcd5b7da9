"""Rules of the kernels that a run asks for, and of the GPUs that these run on."""

from collections.abc import Iterator
from typing import Any

from pretrain.config.layout_checks import letters_of
from pretrain.config.schema import RunConfig
from pretrain.rehearsal.gpus import GPUS, Gpu
from xlstm_io.errors import ConfigError

_INSTEAD = "use memory.slstm_form=graphs"


def _is_persistent(config: RunConfig) -> bool:
    return config.memory.slstm_form == "persistent"


def _share(config: RunConfig) -> dict[str, int]:
    """What a rank computes at a time: rows, heads, and the width of a head."""
    model, layout = config.model, config.layout
    heads = max(model.num_heads // (layout.tensor * layout.context), 1)
    width = model.hidden_size // model.num_heads
    return {"batch": config.data.micro_batch, "heads": heads, "d": width}


def _misfit(config: RunConfig, processors: int, shared: int) -> str | None:
    """Why a rank's sLSTM does not fit a GPU in its persistent form; None if it fits."""
    # The formula of the kernels' own plan. Its package imports torch, which checks do without.
    from xlstm_kernels.common.device_limits import Device
    from xlstm_kernels.slstm.triton.persistent_group import misfit_reason

    return misfit_reason(**_share(config), device=Device(processors, shared))


def gpus_for_persistent(config: RunConfig) -> list[str]:
    """Names of the known GPUs that hold the persistent sLSTM of a run; the others do not."""
    return [
        gpu.name for gpu in GPUS.values() if _misfit(config, gpu.processors, gpu.shared) is None
    ]


def _slstm_form(config: RunConfig) -> Iterator[str]:
    model = config.model
    if not _is_persistent(config):
        return
    asked = "memory.slstm_form=persistent"
    if "s" not in letters_of(config):
        yield f"{asked}, but model.pattern has no s; {_INSTEAD}"
        return
    if config.engine.precision != "bf16":
        yield (
            f"{asked} keeps weights in bf16, and engine.precision={config.engine.precision}; "
            f"{_INSTEAD}, or engine.precision=bf16"
        )
    if model.slstm_input_gate != "exp":
        yield (
            f"{asked} has an exponential input gate only, and model.slstm_input_gate="
            f"{model.slstm_input_gate}; {_INSTEAD}"
        )
    if model.kernel_backend == "torch":
        yield f"{asked} runs on Triton, and model.kernel_backend=torch; leave one of them out"
    if not gpus_for_persistent(config):
        largest = max(GPUS.values(), key=lambda gpu: (gpu.shared, gpu.processors))
        yield (
            f"{asked} fits none of {', '.join(GPUS)}: of the largest, "
            f"{_misfit(config, largest.processors, largest.shared)}; {_INSTEAD}, a smaller "
            "data.micro_batch or a larger layout.tensor"
        )


KERNEL_CHECKS = (_slstm_form,)


def check_gpu(config: RunConfig, gpu: Gpu) -> None:
    """Check that the kernels that a run asks for fit a kind of GPU.

    Raises:
        ConfigError: the persistent sLSTM does not.
    """
    if _is_persistent(config) and (reason := _misfit(config, gpu.processors, gpu.shared)):
        raise ConfigError(
            f"memory.slstm_form=persistent does not fit {gpu.name}: {reason}; {_INSTEAD}"
        )


def check_kernels(config: RunConfig, device: Any) -> None:
    """Check that the kernels that a run asks for run on this process's device.

    Args:
        config: the run.
        device: the torch.device.

    Raises:
        ConfigError: Triton kernels are asked for on the CPU, or the persistent sLSTM is where it
            cannot run.
    """
    if device.type == "cpu" and config.model.kernel_backend == "triton":
        raise ConfigError(
            "model.kernel_backend=triton needs a GPU, and this run is on the CPU; leave it "
            "out to let each kernel take the best backend it has"
        )
    if not _is_persistent(config):
        return
    if device.type == "cpu":
        raise ConfigError(
            "memory.slstm_form=persistent needs a GPU, and this run is on the CPU; leave it out"
        )
    import torch  # which reading a run file does without

    from xlstm_kernels.common.backends import Like, select_backend

    try:
        like = Like(device, torch.bfloat16)
        select_backend("slstm_scan", "persistent", like, **_share(config))
    except ValueError as error:
        raise ConfigError(f"memory.slstm_form=persistent: {error}; {_INSTEAD}") from None
