"""Rules of the kernels that a run asks for, and of the GPUs that these run on."""

import math
from collections.abc import Iterator
from typing import Any

from pretrain.config.checks.layout import letters_of
from pretrain.config.schema import RunConfig
from pretrain.rehearsal.gpus import GPUS, Gpu
from xlstm_io.errors import ConfigError
from xlstm_mcore.sizes.dimensions import dimensions

# The widest that the Triton kernels take, and what each says itself. Written down here because
# their modules import torch, which checks do without; a test holds both together.
WIDEST_HEAD, WIDEST_NORM, LEAST_CHUNK, QKV_TILES = 1024, 4096, 16, (16, 32)

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


def _cells_on_pytorch(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The recurrences of a run that have no Triton kernel, and why."""
    model, sizes, letters = config.model, dimensions(config.model), letters_of(config)
    heads, chunk = model.num_heads, model.chunk_size
    widths = {
        "M": max(sizes.qk, sizes.v) // heads,
        "m": sizes.up // heads,
        "d": max(model.ssm_state_dim, model.ssm_head_dim),
        "s": model.hidden_size // heads,
    }
    for letter, width in widths.items():
        if letter not in letters:
            continue
        cell = f"the {'sLSTM' if letter == 's' else 'mLSTM'} of {letter} blocks"
        if width > WIDEST_HEAD:
            key = "a smaller model.ssm_head_dim" if letter == "d" else "a larger model.num_heads"
            yield cell, f"its heads are {width:,} wide, at most {WIDEST_HEAD:,} can be; use {key}"
        elif letter == "s" and model.slstm_input_gate != "exp":
            yield cell, f"model.slstm_input_gate={model.slstm_input_gate}, only exp can be"
        elif letter != "s" and chunk is not None and chunk < LEAST_CHUNK:
            yield cell, f"model.chunk_size={chunk}, at least {LEAST_CHUNK} can be; leave it out"
    if "l" in letters:
        yield "the LSTM of l blocks", "it has no other implementation"


def _others_on_pytorch(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What else of a run has no Triton kernel, and why."""
    model = config.model
    if model.hidden_size > WIDEST_NORM:
        why = f"model.hidden_size={model.hidden_size:,}, at most {WIDEST_NORM:,} can be"
        yield "the norm of blocks", why
    if "m" in letters_of(config):
        block, width = model.qkv_block_size, dimensions(model).up // model.num_heads
        tile = block * math.gcd(width // block, max(1, QKV_TILES[-1] // block))
        if tile not in QKV_TILES:
            made = f"model.qkv_block_size={block} makes tiles of {tile} in heads of {width:,}"
            taken = " and ".join(map(str, QKV_TILES))
            yield "the projection of m blocks to q, k and v", f"{made}, only {taken} can be"


def on_pytorch(config: RunConfig) -> list[str]:
    """What of a run takes its PyTorch implementation on a GPU too, and why: a sentence for each.

    None where the run asks for that itself.
    """
    if config.model.kernel_backend == "torch":
        return []
    return [
        f"{what} runs in PyTorch on a GPU too, slower than a Triton kernel: {why}"
        for what, why in (*_cells_on_pytorch(config), *_others_on_pytorch(config))
    ]


def _triton_cells(config: RunConfig) -> Iterator[str]:
    if config.model.kernel_backend == "triton":
        for what, why in _cells_on_pytorch(config):
            yield f"model.kernel_backend=triton, but {what} has no Triton kernel here: {why}"


KERNEL_CHECKS = (_slstm_form, _triton_cells)


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
